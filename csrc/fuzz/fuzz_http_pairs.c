/* fuzz_http_pairs.c - stored pairs: reading them, the header block they end up in, and building them again. */
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

#define MEMBERS_MAX 512

static int is_token(const char *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (!(p[i] > ' ' && p[i] < 0x7f) || strchr("\"(),/:;<=>?@[\\]{}", p[i]) != NULL) {
            return 0;
        }
    }
    return n != 0;
}

/* Whole lines of valid names, each name once, and no bare line break. */
static void check_block(const char *p, size_t n) {
    size_t at = 0;
    while (at < n) {
        const char *end = memchr(p + at, '\n', n - at);
        CHECK(end != NULL && end > p + at && end[-1] == '\r');
        size_t line = (size_t)(end - (p + at)) + 1;
        const char *colon = memchr(p + at, ':', line);
        CHECK(colon != NULL);
        size_t name = (size_t)(colon - (p + at));
        CHECK(is_token(p + at, name));
        CHECK(memchr(p + at, '\r', line - 2) == NULL);
        for (size_t other = at + line; other < n;) {
            const char *next = memchr(p + other, '\n', n - other);
            CHECK(next != NULL);
            CHECK(n - other <= name || memcmp(p + other, p + at, name + 1) != 0);
            other = (size_t)(next - p) + 1;
        }
        at += line;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len > 16384) {
        return 0; /* check_block is quadratic */
    }
    static pv_header pairs[MEMBERS_MAX];
    static pv_header headers[MEMBERS_MAX];
    static uint32_t order[MEMBERS_MAX];
    pv_text json = {(const char *)data, len};
    size_t room = 3 * len;
    char *buf = malloc(room + 1);
    size_t count;
    pv_errinfo err;
    CHECK(buf != NULL);
    int rc = pv_pairs_parse(json.p, json.n, buf, room, pairs, MEMBERS_MAX, &count, &err);
    CHECK(rc == 0 || (rc == PV_EPARSE && err.b <= len && count == 0));

    pv_get_req req = {.flags = PV_GET_HEAD};
    pv_get_needle n = {.pairs = json, .flags = PV_F_PAIRS};
    pv_plan plan;
    CHECK_EQ(pv_get_plan(&req, &n, NULL, NULL, 0, NULL, 0, &plan, &err), PV_EBUFFER);
    char *head = malloc(err.a);
    CHECK(head != NULL && err.b == 0);
    CHECK_EQ(pv_get_plan(&req, &n, NULL, head, err.a, NULL, 0, &plan, &err), PV_GET_DONE);
    CHECK_EQ(plan.status, 200);
    check_block(head, plan.head_len);
    free(head);

    /* the members whose names can be header names, sent and stored again, come out the same */
    size_t sent = 0;
    char *names = malloc(9 * (size_t)MEMBERS_MAX + room + 1);
    CHECK(names != NULL);
    char *at = names;
    for (size_t i = 0; i < count && i < MEMBERS_MAX; i++) {
        if (is_token(pairs[i].name.p, pairs[i].name.n)) {
            memcpy(at, "Seaweed-", 8);
            memcpy(at + 8, pairs[i].name.p, pairs[i].name.n);
            headers[sent].name = (pv_text){at, 8 + pairs[i].name.n};
            headers[sent].value = pairs[i].value;
            at += 8 + pairs[i].name.n;
            sent++;
        }
    }
    char *built = malloc(65536);
    size_t built_len;
    CHECK(built != NULL);
    rc = pv_pairs_build(headers, sent, order, built, 65536, &built_len);
    CHECK(rc == (sent != 0) || rc == 0);
    if (rc == 1) {
        char *again = malloc(3 * built_len);
        static pv_header read[MEMBERS_MAX];
        size_t read_count;
        CHECK(again != NULL);
        CHECK_EQ(pv_pairs_parse(built, built_len, again, 3 * built_len, read, MEMBERS_MAX, &read_count, &err), 0);
        CHECK(read_count > 0 && read_count <= sent);
        for (size_t i = 0; i < read_count; i++) {
            size_t k = 0; /* the first header of this name is the one that was kept */
            char shown[64];
            while (k < sent) {
                size_t full = headers[k].name.n - 8;
                size_t got = pv_header_canonical(headers[k].name.p + 8, full, shown, sizeof shown);
                if (got == read[i].name.n && (got > sizeof shown || memcmp(shown, read[i].name.p, got) == 0)) {
                    break;
                }
                k++;
            }
            CHECK(k < sent);
            CHECK(read[i].name.n > sizeof shown ||
                  (read[i].value.n == headers[k].value.n &&
                   (read[i].value.n == 0 || memcmp(read[i].value.p, headers[k].value.p, read[i].value.n) == 0)));
        }
        free(again);
    }
    free(built);
    free(names);
    free(buf);
    return 0;
}
