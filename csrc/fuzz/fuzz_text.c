/* fuzz_text.c - the small texts of requests: numbers, ttl, truth values, names, what is sniffed. Input: the text.
 *
 * Functions that write say how long it will be, whatever the room, and never write behind it. */
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

/* Writes into exactly so much room as was said, which ends at the end of its block; the same must come as in more room. */
#define WRITES(call)                                                                                                   \
    do {                                                                                                               \
        char *buf = NULL;                                                                                              \
        size_t cap = 0;                                                                                                \
        size_t need = (call);                                                                                          \
        CHECK(need <= 16 * len + 512);                                                                                 \
        cap = need / 2;                                                                                                \
        buf = malloc(cap + (cap == 0));                                                                                \
        CHECK(buf != NULL);                                                                                            \
        CHECK_EQ((call), need);                                                                                        \
        free(buf);                                                                                                     \
        cap = need;                                                                                                    \
        buf = malloc(cap + (cap == 0));                                                                                \
        CHECK(buf != NULL);                                                                                            \
        CHECK_EQ((call), need);                                                                                        \
        for (size_t at = 0; at < need; at++) {                                                                         \
            CHECK(buf[at] != '\r' && buf[at] != '\n' && buf[at] != 0); /* nothing starts a line */                     \
        }                                                                                                              \
        free(buf);                                                                                                     \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len > 4096) {
        return 0;
    }
    char *p = malloc(len + (len == 0)); /* its own block, so that a byte too far is seen */
    CHECK(p != NULL);
    if (len > 0) {
        memcpy(p, data, len);
    }
    uint8_t count = 1, unit = 1;
    int rc = pv_ttl_parse(p, len, &count, &unit);
    CHECK((rc == 1 && unit != 0) ||
          (rc == 0 && count == 0 && unit == 0)); /* Quirk: a count beyond a byte may end as 0 */
    (void)pv_ts_parse(p, len);
    rc = pv_bool_parse(p, len);
    CHECK(rc == 0 || rc == 1 || rc == PV_EPARSE);
    int64_t v = 1;
    rc = pv_int_parse(p, len, &v);
    CHECK(rc == 0 || (rc == PV_EPARSE && v == 0) || (rc == PV_ERANGE && (v == INT64_MAX || v == INT64_MIN)));
    if (rc == 0) {
        char text[24];
        int n = snprintf(text, sizeof text, "%" PRId64, v);
        int64_t again;
        CHECK_EQ(pv_int_parse(text, (size_t)n, &again), 0);
        CHECK_EQ(again, v);
    }
    const char *type = pv_sniff((const uint8_t *)p, len);
    CHECK(type != NULL && strchr(type, '/') != NULL && strpbrk(type, "\r\n") == NULL);
    pv_text ext;
    pv_name_ext(p, len, &ext);
    CHECK(ext.n == 0 || (ext.p >= p && ext.p + ext.n <= p + len && ext.p[0] == '.'));
    static pv_mime *mime;
    if (mime == NULL) {
        CHECK_EQ(pv_mime_new(&mime), 0);
        CHECK_EQ(pv_mime_seal(mime), 0);
    }
    pv_text found;
    rc = pv_mime_lookup(mime, ext.p, ext.n, &found);
    CHECK((rc == 1 && found.n > 0) || (rc == 0 && found.n == 0));
    size_t half = len / 2;
    if (half > 0 && p[0] == '.') {
        pv_mime *own;
        CHECK_EQ(pv_mime_new(&own), 0);
        rc = pv_mime_add(own, p, half, p + half, len - half, 0);
        CHECK(rc == 0 || rc == 1);
        CHECK_EQ(pv_mime_seal(own), 0);
        rc = pv_mime_lookup(own, p, half, &found);
        CHECK((rc == 1 && found.n > 0) || (rc == 0 && found.n == 0));
        pv_mime_free(own);
    }
    const pv_text a = {.p = p, .n = half}, b = {.p = p + half, .n = len - half};
    WRITES(pv_go_quote(p, len, buf, cap));
    WRITES(pv_json_escape(p, len, buf, cap));
    WRITES(pv_content_disposition(1, p, len, buf, cap));
    WRITES(pv_write_reply(a, 7, 9, b, a, buf, cap));
    free(p);
    return 0;
}
