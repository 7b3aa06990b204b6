/* fuzz_http_range.c - Range headers (and dates) for data of any size: 8 bytes of size, then the header. The answer's
 * body must be as long as it says, and within the data.
 */
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void check_answer(const pv_get_req *req, const pv_get_needle *n, int kind, size_t count) {
    pv_plan plan;
    pv_errinfo err;
    char *buf = NULL;
    pv_body_part *parts = NULL;
    int rc = pv_get_plan(req, n, NULL, NULL, 0, NULL, 0, &plan, &err);
    CHECK_EQ(rc, PV_EBUFFER);
    buf = malloc(err.a + 1);
    parts = calloc(err.b + 1, sizeof *parts);
    CHECK(buf != NULL && parts != NULL);
    CHECK_EQ(pv_get_plan(req, n, NULL, buf, err.a, parts, err.b, &plan, &err), PV_GET_DONE);
    uint64_t sum = 0;
    for (size_t i = 0; i < plan.parts; i++) {
        CHECK(parts[i].data_offset <= n->data_len && parts[i].data_len <= n->data_len - parts[i].data_offset);
        sum += parts[i].data_len + parts[i].text_len;
    }
    CHECK_EQ(sum, plan.body_len);
    char want[48];
    int digits = snprintf(want, sizeof want, "\r\nContent-Length: %" PRIu64 "\r\n", plan.body_len);
    const char *hit = memmem(buf, plan.head_len, want, (size_t)digits);
    CHECK((hit != NULL) == ((plan.flags & PV_PLAN_NO_LENGTH) == 0));
    switch (kind) {
    case PV_RANGE_NONE:
        CHECK(plan.status == 200 && plan.body_len == n->data_len);
        break;
    case PV_RANGE_EMPTY:
        CHECK(plan.status == 200 && plan.body_len == 0);
        break;
    case PV_RANGE_SINGLE:
        CHECK(plan.status == 206 && plan.parts <= 1);
        break;
    case PV_RANGE_MULTI:
        CHECK(plan.status == 206 && plan.parts == count + 1);
        break;
    default:
        CHECK(plan.status == 416);
    }
    free(parts);
    free(buf);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    static const uint8_t random30[30] = {1, 2, 3};
    uint8_t size[8] = {0};
    size_t head = len < sizeof size ? len : sizeof size;
    memcpy(size, data, head);
    pv_text header = {(const char *)data + head, len - head};
    pv_get_needle n = {.mime = {"a/b", 3}, .data_len = pv__get_be64(size) & INT64_MAX};
    pv_get_req req = {.range = header, .random30 = random30};
    pv_range r[8];
    size_t count;
    int kind = pv_range_parse(header.p, header.n, n.data_len, r, PV__ARRAY_LEN(r), &count);
    CHECK(count == 0 || kind == PV_RANGE_SINGLE || kind == PV_RANGE_MULTI);
    for (size_t i = 0; i < count && i < PV__ARRAY_LEN(r); i++) {
        CHECK((r[i].start >= 0 && r[i].length >= 0 && (uint64_t)r[i].start <= n.data_len) || count == 1);
    }
    check_answer(&req, &n, kind, count);
    int64_t unix_s;
    if (pv_http_date_parse(header.p, header.n, &unix_s) == 0) {
        char text[64];
        int64_t again;
        size_t written = pv_http_date(unix_s, text, sizeof text);
        CHECK_EQ(pv_http_date_parse(text, written, &again), 0);
        CHECK_EQ(again, unix_s);
    }
    req.range.n = 0;
    req.if_none_match = header;
    CHECK_EQ(pv_cond_eval(req.range, header, 0, 0), header.n == 10 && memcmp(header.p, "\"00000000\"", 10) == 0);
    return 0;
}
