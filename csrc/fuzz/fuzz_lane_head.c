/* fuzz_lane_head.c - request heads, whole and in pieces: two bytes of where to cut, then the head. What is recognised in one
 * piece must be recognised alike in two, and lie within the input. */
#include "../pv_lane_int.h"
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len < 2) {
        return 0;
    }
    size_t cut = pv__get_be16(data);
    size_t n = len - 2;
    char *text = malloc(n != 0 ? n : 1); /* its own block, so that a byte too far is seen */
    CHECK(text != NULL);
    memcpy(text, data + 2, n);
    pv__head whole = {0}, pieces = {0};
    int rc = pv__head_feed(&whole, text, n);
    CHECK(rc == PV_EMORE || rc == PV_EPARSE || (rc > 0 && (size_t)rc <= n));
    int rc2 = PV_EMORE;
    if (cut < n) {
        rc2 = pv__head_feed(&pieces, text, cut);
    }
    if (rc2 == PV_EMORE) {
        rc2 = pv__head_feed(&pieces, text, n);
    }
    CHECK_EQ(rc, rc2);
    if (rc > 0) {
        CHECK_MEM(&whole.fields, &pieces.fields, sizeof whole.fields);
        CHECK(whole.method != PV__M_NONE && whole.path.n >= 2 && text[whole.path.at] == '/');
        CHECK(memcmp(text + rc - 4, "\r\n\r\n", 4) == 0);
        for (size_t i = 0; i < PV__F_COUNT; i++) {
            CHECK((size_t)whole.fields[i].at + whole.fields[i].n <= (size_t)rc);
        }
    }
    free(text);
    return 0;
}
