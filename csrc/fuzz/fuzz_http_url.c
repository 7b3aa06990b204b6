/* fuzz_http_url.c - request paths: splitting, ids and their error texts, and the texts made of names. */
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static pv_text whole;

/* A text that was cut out lies within the decoded path. */
static void check_inside(pv_text t) {
    CHECK(t.n == 0 || (t.p >= whole.p && t.p + t.n <= whole.p + whole.n));
}

static void check_error(const pv_id_error *e) {
    CHECK(e->code != PV_ID_OK);
    size_t n = pv_fid_error_text(e, NULL, 0);
    char *text = malloc(n + 1);
    CHECK(n > 0 && text != NULL);
    CHECK_EQ(pv_fid_error_text(e, text, n), n);
    size_t quoted = pv_json_escape(text, n, NULL, 0);
    char *json = malloc(quoted);
    CHECK(json != NULL);
    CHECK_EQ(pv_json_escape(text, n, json, quoted), quoted);
    for (size_t i = 0; i < quoted; i++) {
        CHECK((unsigned char)json[i] >= 0x20 && json[i] != '<' && json[i] != '>' && json[i] != '&');
    }
    free(json);
    free(text);
}

static void check_fid(pv_text t) {
    pv_id_error e;
    uint64_t key;
    uint32_t cookie;
    if (pv_fid_parse(t.p, t.n, &key, &cookie, &e) != 0) {
        check_error(&e);
    }
}

/* File ids of a BatchDelete, one a line: every line is found, and its result fits. */
static void check_deletes(const char *text, size_t len) {
    size_t lines = 1;
    for (size_t i = 0; i < len; i++) {
        lines += text[i] == '\n';
    }
    pv_delete *items = calloc(lines, sizeof *items);
    size_t cap = len + 32 * lines;
    uint8_t *answer = malloc(cap);
    CHECK(items != NULL && answer != NULL);
    for (uint32_t flags = 0; flags <= PV_DELETE_ANY_COOKIE; flags++) {
        CHECK_EQ(pv_delete_parse(text, len, flags, items, lines), lines);
        for (size_t i = 0; i < lines; i++) {
            CHECK(items[i].at <= len && items[i].len <= len - items[i].at);
            items[i].size = i % 2 == 0 ? INT32_MAX : 0;
        }
        CHECK(pv_delete_answer(text, items, lines, answer, cap) > 0);
    }
    free(answer);
    free(items);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    const char *raw = (const char *)data;
    check_deletes(raw, len);
    char *buf = malloc(len + 1);
    pv_url u;
    pv_errinfo err;
    CHECK(buf != NULL);
    int rc = pv_url_parse(raw, len, buf, len, &u, &err);
    if (rc != 0) {
        CHECK(rc == PV_EPARSE && err.b < len && raw[err.b] == '%');
        free(buf);
        return 0;
    }
    whole = u.path;
    check_inside(u.vid);
    check_inside(u.fid);
    check_inside(u.filename);
    check_inside(u.ext);
    check_inside(u.claim_fid);
    CHECK(u.claim_fid.n <= u.fid.n);
    pv_id_error e;
    uint32_t vid;
    if (pv_vid_parse(u.vid.p, u.vid.n, &vid, &e) != 0) {
        check_error(&e);
    } else {
        CHECK(u.kind == PV_URL_NEEDLE || u.kind == PV_URL_VID_ONLY);
    }
    check_fid(u.fid);
    pv_text fid;
    pv_url_write_fid(u.path.p, u.path.n, &fid);
    check_inside(fid);
    check_fid(fid);
    size_t n = pv_content_disposition(0, u.path.p, u.path.n, NULL, 0);
    char *text = malloc(n);
    CHECK(text != NULL);
    CHECK_EQ(pv_content_disposition(0, u.path.p, u.path.n, text, n), n);
    for (size_t i = 0; i < n; i++) {
        CHECK((text[i] >= ' ' && text[i] <= '~') || text[i] == '\t');
    }
    free(text);
    free(buf);
    return 0;
}
