/* fuzz_http_multipart.c - uploads: a byte of choices, then Content-Type and Content-Disposition, each ended by a zero
 * byte, then the body.
 */
#include "../test/t.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static pv_mime *table;

static pv_text take_text(const uint8_t **p, size_t *n) {
    const uint8_t *end = *n != 0 ? memchr(*p, 0, *n) : NULL;
    size_t len = end != NULL ? (size_t)(end - *p) : *n;
    pv_text t = {(const char *)*p, len};
    size_t skip = end != NULL ? len + 1 : len;
    *p += skip;
    *n -= skip;
    return t;
}

/* Every byte of a text can be read: it points to something alive. */
static unsigned touch(pv_text t) {
    unsigned sum = 0;
    for (size_t i = 0; i < t.n; i++) {
        sum += (unsigned char)t.p[i];
    }
    return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (table == NULL) {
        CHECK_EQ(pv_mime_new(&table), 0);
        CHECK_EQ(pv_mime_seal(table), 0);
    }
    uint8_t choice = len != 0 ? data[0] : 0;
    const uint8_t *p = data + (len != 0);
    size_t n = len - (len != 0);
    pv_upload_req req = {.method = {choice & 1 ? "PUT" : "POST", choice & 1 ? 3 : 4},
                         .path = {"/3,64deadbeef.txt", 17}};
    req.content_type = take_text(&p, &n);
    req.content_disposition = take_text(&p, &n);
    req.body = p;
    req.body_len = n;
    req.size_limit = choice & 2 ? 16 : 1 << 20;
    req.is_manifest = choice & 4;
    req.mime = table;
    pv_text message;
    int form = pv_form_check(req.content_type.p, req.content_type.n, &message);
    CHECK(form == 0 || form == 1 || (form == PV_EPARSE && touch(message) != 0));

    pv_upload up;
    pv_errinfo err;
    size_t cap = 0;
    char *scratch = NULL;
    int rc;
    while ((rc = pv_upload_parse(&req, scratch, cap, &up, &err)) == PV_EBUFFER) {
        CHECK(err.a >= 2 * cap && err.a > 0 && err.a < ((size_t)64 << 20));
        free(scratch);
        cap = err.a;
        scratch = malloc(cap);
        CHECK(scratch != NULL);
    }
    if (rc != 0) {
        CHECK(rc == PV_EPARSE && touch(up.message) != 0);
        free(scratch);
        return 0;
    }
    CHECK(up.data_len == 0 || (up.data >= p && up.data + up.data_len <= p + n));
    CHECK(up.decoded_len <= req.size_limit && up.decoded_len <= up.data_len);
    CHECK(up.is_multipart || (up.data_len == n && up.name.n != 0));
    (void)(touch(up.name) + touch(up.mime) + touch(up.md5));
    for (size_t i = 1; i < up.name.n; i++) {
        CHECK(up.name.p[i] != '/' && up.name.p[i] != '\\');
    }
    if (up.quoted) {
        uint8_t *plain = malloc(up.decoded_len + 1);
        size_t out;
        CHECK(plain != NULL);
        CHECK_EQ(pv_qp_decode(up.data, up.data_len, plain, up.decoded_len, &out), 0);
        CHECK_EQ(out, up.decoded_len);
        free(plain);
    }
    CHECK((unsigned)pv_should_compress(up.name, up.mime, up.data, up.data_len) <= 1);
    free(scratch);
    return 0;
}
