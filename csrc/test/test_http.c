/* test_http.c - every row of the HTTP contract's tables that the HTTP part decides, each input with its last byte at a
 * guard page and cut off at every length, each text rendered into room that is just enough and one byte short.
 */
#include "t.h"

#define GUARD_ROOM 65536
#define ROOM 131072

static t_guard in_guard;
static t_guard out_guard;

/* ------------------------------------------------------------------ helpers */

typedef struct lit {
    const char *p;
    size_t n;
} lit;

#define L(s) {"" s, sizeof(s) - 1}
#define LV(s) ((lit){"" s, sizeof(s) - 1})

static pv_text text(lit s) {
    return (pv_text){s.p, s.n};
}

static const char *guarded(lit s) {
    return (const char *)t_guard_put(&in_guard, s.p, s.n);
}

#define CHECK_TEXT(got, want) check_text(__LINE__, (got).p, (got).n, (want))

static void check_text(int line, const char *p, size_t n, lit want) {
    if (n != want.n || (n != 0 && memcmp(p, want.p, n) != 0)) {
        fprintf(stderr, "got  [%.*s]\nwant [%.*s]\n", (int)n, n != 0 ? p : "", (int)want.n, want.p);
        t_fail(__FILE__, line, "texts are the same");
    }
}

/* Renders by EXPR (of buf and cap) into no room, exact room at a guard page, and one byte too little. */
#define CHECK_RENDER(want, expr)                                                                                       \
    do {                                                                                                               \
        lit w_ = (want);                                                                                               \
        char *buf = (char *)out_guard.map;                                                                             \
        size_t cap = 0;                                                                                                \
        CHECK_EQ((expr), w_.n);                                                                                        \
        cap = w_.n;                                                                                                    \
        buf = (char *)t_guard_put(&out_guard, w_.p, 0) - cap;                                                          \
        memset(buf, 0x55, cap);                                                                                        \
        CHECK_EQ((expr), w_.n);                                                                                        \
        check_text(__LINE__, buf, cap, w_);                                                                            \
        if (cap > 0) {                                                                                                 \
            cap--;                                                                                                     \
            buf++;                                                                                                     \
            CHECK_EQ((expr), w_.n);                                                                                    \
        }                                                                                                              \
    } while (0)

/* ------------------------------------------------------------------ paths and ids (4) */

static const struct url_case {
    lit raw;
    int kind;
    lit vid, fid, filename, ext, claim;
    int unclean;
} url_cases[] = {
    {L("/3/64deadbeef/n.x.txt"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L("n.x.txt"), L(".txt"), L("64deadbeef"), 0},
    {L("/3/64dead.beef/noext"), PV_URL_NEEDLE, L("3"), L("64dead.beef"), L("noext"), L(""), L("64dead.beef"), 0},
    {L("/3/64deadbeef/"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/3/64deadbeef/.png"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(".png"), L(".png"), L("64deadbeef"), 0},
    {L("/3/64deadbeef"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/3/64deadbeef.a.jpg"), PV_URL_NEEDLE, L("3"), L("64deadbeef.a"), L(""), L(".jpg"), L("64deadbeef.a"), 0},
    {L("/3/.jpg"), PV_URL_NEEDLE, L("3"), L(".jpg"), L(""), L(""), L(".jpg"), 0},
    {L("/3,64deadbeef"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/3%2C64deadbeef%2ejpg"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L(".jpg"), L("64deadbeef"), 0},
    {L("/3%2f64deadbeef"), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/3,64deadbeef.a.b"), PV_URL_NEEDLE, L("3"), L("64deadbeef.a"), L(""), L(".b"), L("64deadbeef.a"), 0},
    {L("/3,64deadbeef."), PV_URL_NEEDLE, L("3"), L("64deadbeef"), L(""), L("."), L("64deadbeef"), 0},
    {L("/3,64deadbeef_2_5.x"), PV_URL_NEEDLE, L("3"), L("64deadbeef_2_5"), L(""), L(".x"), L("64deadbeef_2"), 0},
    {L("/3,_5"), PV_URL_NEEDLE, L("3"), L("_5"), L(""), L(""), L("_5"), 0},
    {L("/3,4,64deadbeef"), PV_URL_NEEDLE, L("3,4"), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/,64deadbeef"), PV_URL_NEEDLE, L(""), L("64deadbeef"), L(""), L(""), L("64deadbeef"), 0},
    {L("/3,"), PV_URL_NEEDLE, L("3"), L(""), L(""), L(""), L(""), 0},
    {L("/3,.x"), PV_URL_NEEDLE, L("3"), L(""), L(""), L(".x"), L(""), 0},
    {L("/3"), PV_URL_VID_ONLY, L("3"), L(""), L(""), L(""), L(""), 0},
    {L("/3.5"), PV_URL_VID_ONLY, L("3.5"), L(""), L(""), L(""), L(""), 0},
    {L("/"), PV_URL_VID_ONLY, L(""), L(""), L(""), L(""), L(""), 0},
    {L("/a/b/c/3"), PV_URL_VID_ONLY, L("3"), L(""), L(""), L(""), L(""), 0},
    {L("/a/b,c/d/"), PV_URL_VID_ONLY, L(""), L(""), L(""), L(""), L(""), 0},
    {L("/a/b/c/3,64deadbeef"), PV_URL_BAD, L("3,64deadbeef"), L(""), L(""), L(""), L(""), 0},
    {L("/a/b/c/123456789,64deadbeef"), PV_URL_BAD, L("123456789,64deadbeef"), L(""), L(""), L(""), L(""), 0},
    {L("/3.5,64deadbeef"), PV_URL_DROP, L("3.5"), L(""), L(""), L(""), L(""), 0},
    {L("/.3,64deadbeef"), PV_URL_DROP, L(".3"), L(""), L(""), L(""), L(""), 0},
    {L("/1,a.b,c"), PV_URL_DROP, L("1,a.b"), L(""), L(""), L(""), L(""), 0},
    {L("*"), PV_URL_BAD, L(""), L(""), L(""), L(""), L(""), 1},
    {L(""), PV_URL_BAD, L(""), L(""), L(""), L(""), L(""), 1},
    {L("/3,64deadbeef/"), PV_URL_NEEDLE, L("3,64deadbeef"), L(""), L(""), L(""), L(""), 0},
    /* canonical paths (2): judged on the path as sent, unless Go would escape that anew */
    {L("//3,01"), PV_URL_NEEDLE, L(""), L("3,01"), L(""), L(""), L("3,01"), 1},
    {L("/a/../3"), PV_URL_NEEDLE, L("a"), L(".."), L("3"), L(""), L(".."), 1},
    {L("/./3"), PV_URL_NEEDLE, L("."), L("3"), L(""), L(""), L("3"), 1},
    {L("/3/.."), PV_URL_NEEDLE, L("3"), L("."), L(""), L("."), L("."), 1},
    {L("/3/..."), PV_URL_NEEDLE, L("3"), L(".."), L(""), L("."), L(".."), 0},
    {L("/%2e%2e/3"), PV_URL_NEEDLE, L(".."), L("3"), L(""), L(""), L("3"), 0},
    {L("/%2F%2F3"), PV_URL_NEEDLE, L(""), L(""), L("3"), L(""), L(""), 0},
    {L("/\"%2e%2e/%2e"), PV_URL_NEEDLE, L("\".."), L("."), L(""), L(""), L("."), 1},
};

static void urls(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(url_cases); i++) {
        const struct url_case *c = &url_cases[i];
        for (size_t n = 0; n <= c->raw.n; n++) {
            pv_url u;
            pv_errinfo err;
            char *buf = (char *)out_guard.map + out_guard.room - n;
            const char *raw = guarded((lit){c->raw.p, n});
            int rc = pv_url_parse(raw, n, buf, n, &u, &err);
            if (n < c->raw.n) {
                CHECK(rc == 0 || (rc == PV_EPARSE && err.b < n));
                continue;
            }
            CHECK_EQ(rc, 0);
            CHECK_EQ(u.kind, c->kind);
            CHECK_EQ(u.unclean, c->unclean);
            CHECK_TEXT(u.vid, c->vid);
            CHECK_TEXT(u.fid, c->fid);
            CHECK_TEXT(u.filename, c->filename);
            CHECK_TEXT(u.ext, c->ext);
            CHECK_TEXT(u.claim_fid, c->claim);
            if (u.kind == PV_URL_BAD || u.kind == PV_URL_DROP) {
                uint32_t vid;
                CHECK_EQ(pv_vid_parse(u.vid.p, u.vid.n, &vid, NULL), PV_EPARSE);
            }
        }
    }
    static const lit bad[] = {L("/%"), L("/%2"), L("/%zz"), L("/a%2gb")};
    for (size_t i = 0; i < PV__ARRAY_LEN(bad); i++) {
        pv_url u;
        pv_errinfo err;
        char buf[16];
        CHECK_EQ(pv_url_parse(guarded(bad[i]), bad[i].n, buf, sizeof buf, &u, &err), PV_EPARSE);
        CHECK(bad[i].p[err.b] == '%');
        CHECK_EQ(pv_url_parse(bad[i].p, bad[i].n, buf, 1, &u, &err), PV_EBUFFER);
        CHECK_EQ(err.a, bad[i].n);
    }
}

static void write_fids(void) {
    static const struct {
        lit path, fid;
    } cases[] = {
        {L("/3,64deadbeef"), L("64deadbeef")},
        {L("/3,64deadbeef.jpg"), L("64deadbeef")},
        {L("/3/64deadbeef"), L("/3/64deadbeef")},
        {L("/3/x/3,80deadbeef"), L("80deadbeef")},
        {L("/3"), L("/3")},
        {L("/1,.e2e0b000f01a1191729"), L("")},
        {L("/1/2/3/4/5"), L("/1/2/3/4/5")},
        {L("/3,64.deadbeef.tar.gz"), L("64.deadbeef.tar")},
        {L("/a.b,64deadbeef"), L("64deadbeef")},
        {L("/1,a.b,c"), L("c")},
        {L(""), L("")},
        {L("/a.b"), L("/a")},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        pv_text fid;
        pv_url_write_fid(guarded(cases[i].path), cases[i].path.n, &fid);
        CHECK_TEXT(fid, cases[i].fid);
    }
}

static const struct vid_case {
    lit in;
    uint32_t vid;
    int code;
    lit error;
} vid_cases[] = {
    {L("3"), 3, 0, L("")},
    {L("0003"), 3, 0, L("")},
    {L("4294967295"), 4294967295, 0, L("")},
    {L("x"), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"x\": invalid syntax")},
    {L(""), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"\": invalid syntax")},
    {L("+3"), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"+3\": invalid syntax")},
    {L("1_0"), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"1_0\": invalid syntax")},
    {L("a\"\\\n\x01\x7f"), 0, PV_ID_VID_SYNTAX,
     L("strconv.ParseUint: parsing \"a\\\"\\\\\\n\\x01\\x7f\": invalid syntax")},
    {L("\xe9"), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"\\xe9\": invalid syntax")},
    {L("\xc3\xa9\xe2\x80\xa8\xf3\xa0\x80\x81"), 0, PV_ID_VID_SYNTAX,
     L("strconv.ParseUint: parsing \"\xc3\xa9\\u2028\\U000e0001\": invalid syntax")},
    {L("4294967296"), 0, PV_ID_VID_RANGE, L("strconv.ParseUint: parsing \"4294967296\": value out of range")},
    {L("99999999999999999999"), 0, PV_ID_VID_RANGE,
     L("strconv.ParseUint: parsing \"99999999999999999999\": value out of range")},
    {L("99999999999999999999x"), 0, PV_ID_VID_RANGE,
     L("strconv.ParseUint: parsing \"99999999999999999999x\": value out of range")},
    {L("4294967296x"), 0, PV_ID_VID_SYNTAX, L("strconv.ParseUint: parsing \"4294967296x\": invalid syntax")},
};

static void vids(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(vid_cases); i++) {
        const struct vid_case *c = &vid_cases[i];
        pv_id_error e;
        uint32_t vid = 77;
        CHECK_EQ(pv_vid_parse(guarded(c->in), c->in.n, &vid, &e), c->code == 0 ? 0 : PV_EPARSE);
        CHECK_EQ(vid, c->vid);
        if (c->code != 0) {
            CHECK_EQ(e.code, c->code);
            CHECK_RENDER(c->error, pv_fid_error_text(&e, buf, cap));
        }
    }
}

static const struct fid_case {
    lit in;
    uint64_t key;
    uint32_t cookie;
    int code;
    lit error;
} fid_cases[] = {
    {L("64deadbeef"), 0x64, 0xdeadbeef, 0, L("")},
    {L("064DEADBEEF"), 0x64, 0xdeadbeef, 0, L("")},
    {L("ffffffffffffffff00000001"), UINT64_MAX, 1, 0, L("")},
    {L("64deadbeef_"), 0x64, 0xdeadbeef, 0, L("")},
    {L("64deadbeef_5"), 0x69, 0xdeadbeef, 0, L("")},
    {L("fffffffffffffff0deadbeef_15"), UINT64_MAX, 0xdeadbeef, 0, L("")},
    {L("64"), 0, 0, PV_ID_FID_INVALID, L("Invalid fid: 64")},
    {L(""), 0, 0, PV_ID_FID_INVALID, L("Invalid fid: ")},
    {L("deadbeef"), 0, 0, PV_ID_FID_INVALID, L("Invalid fid: deadbeef")},
    {L("deadbeef_"), 0, 0, PV_ID_SHORT, L("KeyHash is too short.")},
    {L("64_deadbeef"), 0, 0, PV_ID_SHORT, L("KeyHash is too short.")},
    {L("0123456789abcdef0deadbeef"), 0, 0, PV_ID_LONG, L("KeyHash is too long.")},
    {L("6zdeadbeef"), 0, 0, PV_ID_KEY,
     L("Parse needleId error: needle id 6z format error: strconv.ParseUint: parsing \"6z\": invalid syntax")},
    {L("_4deadbeef"), 0, 0, PV_ID_KEY,
     L("Parse needleId error: needle id _4 format error: strconv.ParseUint: parsing \"_4\": invalid syntax")},
    {L("64deadbezz"), 0, 0, PV_ID_COOKIE,
     L("Parse cookie error: needle cookie deadbezz format error: strconv.ParseUint: parsing \"deadbezz\": invalid "
       "syntax")},
    {L("64deadbeef_x"), 0, 0, PV_ID_DELTA_SYNTAX, L("strconv.ParseUint: parsing \"x\": invalid syntax")},
    {L("64deadbeef_99999999999999999999"), 0, 0, PV_ID_DELTA_RANGE,
     L("strconv.ParseUint: parsing \"99999999999999999999\": value out of range")},
    {L("ffffffffffffffffdeadbeef_2"), 0, 0, PV_ID_DELTA_OVERFLOW,
     L("delta 2 overflows needle id 66666666666666666666666666666666")},
};

static void fids(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(fid_cases); i++) {
        const struct fid_case *c = &fid_cases[i];
        for (size_t n = 0; n <= c->in.n; n++) {
            pv_id_error e;
            uint64_t key = 7;
            uint32_t cookie = 7;
            int rc = pv_fid_parse(guarded((lit){c->in.p, n}), n, &key, &cookie, &e);
            CHECK(rc == 0 || (rc == PV_EPARSE && e.code != 0));
            if (n < c->in.n) {
                continue;
            }
            CHECK_EQ(rc, c->code == 0 ? 0 : PV_EPARSE);
            CHECK_EQ(key, c->key);
            CHECK_EQ(cookie, c->cookie);
            if (rc != 0) {
                CHECK_EQ(e.code, c->code);
                CHECK_RENDER(c->error, pv_fid_error_text(&e, buf, cap));
            }
        }
    }
}

/* ------------------------------------------------------------------ ranges (6.8) */

static const struct range_case {
    lit in;
    uint64_t total;
    int kind;
    size_t count;
    pv_range r[3];
} range_cases[] = {
    {L(""), 11, PV_RANGE_NONE, 0, {{0, 0}}},
    {L("bytes=0-4"), 11, PV_RANGE_SINGLE, 1, {{0, 5}}},
    {L("bytes=6-"), 11, PV_RANGE_SINGLE, 1, {{6, 5}}},
    {L("bytes=0 - 4"), 11, PV_RANGE_SINGLE, 1, {{0, 5}}},
    {L("bytes=0-0,"), 11, PV_RANGE_SINGLE, 1, {{0, 1}}},
    {L("bytes= , ,0-0 ,"), 11, PV_RANGE_SINGLE, 1, {{0, 1}}},
    {L("bytes=\xc2\xa0+1-+3\xe3\x80\x80"), 11, PV_RANGE_SINGLE, 1, {{1, 3}}},
    {L("bytes=\xc2\x85\xe1\x9a\x80\xe2\x80\x80\xe2\x80\x8a"
       "1\xe2\x80\xa8-\xe2\x80\xa9\xe2\x80\xaf"
       "3\xe2\x81\x9f\v\f"),
     11,
     PV_RANGE_SINGLE,
     1,
     {{1, 3}}}, /* Unicode's white space is all trimmed, what only looks like it is not */
    {L("bytes=\xe2\x80\x8b"
       "1-3"),
     11,
     PV_RANGE_INVALID,
     0,
     {{0, 0}}},
    {L("bytes=1-3\xe1\xa0\x8e"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=1-3\x85"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=5-999"), 11, PV_RANGE_SINGLE, 1, {{5, 6}}},
    {L("bytes=0-9223372036854775807"), 11, PV_RANGE_SINGLE, 1, {{0, 11}}},
    {L("bytes=-5"), 11, PV_RANGE_SINGLE, 1, {{6, 5}}},
    {L("bytes=-50"), 11, PV_RANGE_SINGLE, 1, {{0, 11}}},
    {L("bytes=11-"), 11, PV_RANGE_SINGLE, 1, {{11, 0}}},
    {L("bytes=11-20"), 11, PV_RANGE_SINGLE, 1, {{11, 0}}},
    {L("bytes=-0"), 11, PV_RANGE_SINGLE, 1, {{11, 0}}},
    {L("bytes=0-"), 0, PV_RANGE_SINGLE, 1, {{0, 0}}},
    {L("bytes=0-4"), 0, PV_RANGE_SINGLE, 1, {{0, 0}}},
    {L("bytes=-7"), 0, PV_RANGE_SINGLE, 1, {{0, 0}}},
    {L("bytes=1-"), 0, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=12-"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=5-4"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("0-4"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("Bytes=0-4"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("items=0-4"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=a-4"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=0-b"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=3"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=-"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=0--5"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=0-4,x"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes=0-9223372036854775808"), 11, PV_RANGE_INVALID, 0, {{0, 0}}},
    {L("bytes="), 11, PV_RANGE_EMPTY, 0, {{0, 0}}},
    {L("bytes=,, ,"), 11, PV_RANGE_EMPTY, 0, {{0, 0}}},
    {L("bytes=0-10,0-0"), 11, PV_RANGE_EMPTY, 0, {{0, 0}}},
    {L("bytes=--5"), 11, PV_RANGE_SINGLE, 1, {{16, -5}}},
    {L("bytes=--9223372036854775808"), 13, PV_RANGE_SINGLE, 1, {{INT64_MIN + 13, INT64_MIN}}},
    {L("bytes=--3,0-1"), 13, PV_RANGE_OUTSIDE, 0, {{0, 0}}},
    {L("bytes=--9223372036854775808,0-1"), 13, PV_RANGE_OUTSIDE, 0, {{0, 0}}},
    {L("bytes=0-,--2"), INT64_MAX, PV_RANGE_OUTSIDE, 0, {{0, 0}}},
    {L("bytes=0-1,3-4,0-1"), 11, PV_RANGE_MULTI, 3, {{0, 2}, {3, 2}, {0, 2}}},
    {L("bytes=0-,0-"), 0, PV_RANGE_MULTI, 2, {{0, 0}, {0, 0}}},
    {L("bytes=0-0,11-,-1"), 11, PV_RANGE_MULTI, 3, {{0, 1}, {11, 0}, {10, 1}}},
};

static void ranges(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(range_cases); i++) {
        const struct range_case *c = &range_cases[i];
        for (size_t n = 0; n <= c->in.n; n++) {
            pv_range *r = (pv_range *)(void *)(out_guard.map + out_guard.room - 2 * sizeof *r); /* room for two */
            size_t count = 99;
            int kind = pv_range_parse(guarded((lit){c->in.p, n}), n, c->total, r, 2, &count);
            CHECK(kind >= PV_RANGE_NONE && kind <= PV_RANGE_OUTSIDE);
            if (n < c->in.n) {
                continue;
            }
            CHECK_EQ(kind, c->kind);
            CHECK_EQ(count, c->count);
            for (size_t k = 0; k < count && k < 2; k++) {
                CHECK_EQ(r[k].start, c->r[k].start);
                CHECK_EQ(r[k].length, c->r[k].length);
            }
        }
    }
    CHECK_RENDER(LV("bytes 0-4/11"), pv_content_range(&(pv_range){0, 5}, 11, buf, cap));
    CHECK_RENDER(LV("bytes 11-10/11"), pv_content_range(&(pv_range){11, 0}, 11, buf, cap));
    CHECK_RENDER(LV("bytes 0--1/0"), pv_content_range(&(pv_range){0, 0}, 0, buf, cap));
    CHECK_RENDER(LV("bytes 16-10/11"), pv_content_range(&(pv_range){16, -5}, 11, buf, cap));
    CHECK_RENDER(LV("bytes -9223372036854775795-12/13"),
                 pv_content_range(&(pv_range){INT64_MIN + 13, INT64_MIN}, 13, buf, cap));
}

/* ------------------------------------------------------------------ dates, tags, conditions (6.3) */

static const struct {
    int64_t unix_s;
    lit date;
} dates[] = {
    {0, L("Thu, 01 Jan 1970 00:00:00 GMT")},
    {1136214245, L("Mon, 02 Jan 2006 15:04:05 GMT")},
    {951782400, L("Tue, 29 Feb 2000 00:00:00 GMT")},
    {4107542399, L("Sun, 28 Feb 2100 23:59:59 GMT")},
    {4107542400, L("Mon, 01 Mar 2100 00:00:00 GMT")},
    {253402300799, L("Fri, 31 Dec 9999 23:59:59 GMT")},
    {1795424219, L("Mon, 23 Nov 2026 08:56:59 GMT")},
    {-1, L("Wed, 31 Dec 1969 23:59:59 GMT")},
    {-62135596800, L("Mon, 01 Jan 0001 00:00:00 GMT")},
};

static void http_dates(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(dates); i++) {
        CHECK_RENDER(dates[i].date, pv_http_date(dates[i].unix_s, buf, cap));
        for (size_t n = 0; n <= dates[i].date.n; n++) {
            int64_t v = 5;
            int rc = pv_http_date_parse(guarded((lit){dates[i].date.p, n}), n, &v);
            CHECK_EQ(rc, n == dates[i].date.n ? 0 : PV_EPARSE);
            CHECK_EQ(v, n == dates[i].date.n ? dates[i].unix_s : 0);
        }
    }
    CHECK_RENDER(LV("Mon, 20 Feb 36812 00:36:15 GMT"), pv_http_date((1LL << 40) - 1, buf, cap));
    static const lit good[] = {
        L("mon, 02 jan 2006 15:04:05 GMT"),    L("Sun, 02 Jan 2006 15:04:05 GMT"),
        L("Mon,  02  Jan 2006 15:04:05  GMT"), L("Mon, 02 Jan 2006 15:04:05.75 GMT"),
        L("Mon, 02 Jan 2006 15:04:05,7 GMT"),
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(good); i++) {
        int64_t v;
        CHECK_EQ(pv_http_date_parse(guarded(good[i]), good[i].n, &v), 0);
        CHECK_EQ(v, 1136214245);
    }
    int64_t one_digit;
    CHECK_EQ(pv_http_date_parse("Mon, 02 Jan 2006 5:04:05 GMT", 28, &one_digit), 0);
    CHECK_EQ(one_digit, 1136214245 - 36000);
    static const lit bad[] = {
        L(""),
        L("Monday, 02-Jan-06 15:04:05 GMT"),
        L("Mon Jan  2 15:04:05 2006"),
        L("Mon, 02 Jan 2006 15:04:05 UTC"),
        L("Mon, 02 Jan 2006 15:04:05 gmt"),
        L("Mon, 02 Jan 2006 15:04:05 GMT "),
        L("Mon,02 Jan 2006 15:04:05 GMT"),
        L("Mon, 2 Jan 2006 15:04:05 GMT"),
        L("Mon, 00 Jan 2006 15:04:05 GMT"),
        L("Mon, 31 Apr 2006 15:04:05 GMT"),
        L("Mon, 29 Feb 2100 15:04:05 GMT"),
        L("Mon, 02 Jam 2006 15:04:05 GMT"),
        L("Mon, 02 Jan 206 15:04:05 GMT"),
        L("Mon, 02 Jan 2006 24:04:05 GMT"),
        L("Mon, 02 Jan 2006 15:60:05 GMT"),
        L("Mon, 02 Jan 2006 15:04:60 GMT"),
        L("Mon, 02 Jan 2006 15:4:05 GMT"),
        L("Mxn, 02 Jan 2006 15:04:05 GMT"),
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(bad); i++) {
        int64_t v;
        CHECK_EQ(pv_http_date_parse(guarded(bad[i]), bad[i].n, &v), PV_EPARSE);
    }
}

static void conditions(void) {
    pv_text none = {NULL, 0};
    pv_text same = text(LV("Mon, 02 Jan 2006 15:04:05 GMT"));
    pv_text before = text(LV("Mon, 02 Jan 2006 15:04:04 GMT"));
    pv_text odd = text(LV("Monday, 02-Jan-06 15:04:06 GMT"));
    pv_text tag = text(LV("\"00c0ffee\""));
    uint64_t at = 1136214245;
    CHECK_EQ(pv_cond_eval(none, none, at, 0xc0ffee), 0);
    CHECK_EQ(pv_cond_eval(same, none, at, 0xc0ffee), 1);
    CHECK_EQ(pv_cond_eval(before, none, at, 0xc0ffee), 0);
    CHECK_EQ(pv_cond_eval(odd, none, at, 0xc0ffee), 0);
    CHECK_EQ(pv_cond_eval(same, none, 0, 0xc0ffee), 0); /* no date stored */
    CHECK_EQ(pv_cond_eval(same, text(LV("\"other\"")), at, 0xc0ffee), 1);
    CHECK_EQ(pv_cond_eval(before, tag, at, 0xc0ffee), 1);
    static const lit no_match[] = {
        L("*"), L("00c0ffee"), L("W/\"00c0ffee\""), L("\"00c0ffee\", \"x\""), L("\"00C0FFEE\""), L("\"00c0ffe\"")};
    for (size_t i = 0; i < PV__ARRAY_LEN(no_match); i++) {
        CHECK_EQ(pv_cond_eval(none, text(no_match[i]), at, 0xc0ffee), 0);
    }
    CHECK_EQ(pv_cond_eval(none, text(LV("\"00000000\"")), 0, 0), 1);
    CHECK_RENDER(LV("\"00c0ffee\""), pv_etag(0xc0ffee, buf, cap));
}

/* ------------------------------------------------------------------ media types (13) */

static void dispositions(void) {
    static const struct {
        lit name, want;
    } cases[] = {
        {L("a.json"), L("inline; filename=a.json")},
        {L("{x|y}~'*%"), L("inline; filename={x|y}~'*%")},
        {L("3,64deadbeef"), L("inline; filename=\"3,64deadbeef\"")},
        {L("a\"b.json"), L("inline; filename=\"a\\\"b.json\"")},
        {L("a\\b\tc"), L("inline; filename=\"a\\\\b\tc\"")},
        {L("a b\xe4\xbd\xa0.json"), L("inline; filename*=utf-8''a%20b%E4%BD%A0.json")},
        {L("*'%(\x7f\n{"), L("inline; filename*=utf-8''%2A%27%25%28%7F%0A{")},
        {L(""), L("inline; filename=\"\"")},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        const char *p = guarded(cases[i].name);
        CHECK_RENDER(cases[i].want, pv_content_disposition(0, p, cases[i].name.n, buf, cap));
    }
    CHECK_RENDER(LV("attachment; filename=x"), pv_content_disposition(1, "x", 1, buf, cap));
}

#define TEXT "text/plain; charset=utf-8"
#define HTML "text/html; charset=utf-8"
#define OCTETS "application/octet-stream"

static const struct {
    lit data;
    const char *type;
} sniffs[] = {
    {L(""), TEXT},
    {L(" \t\n"), TEXT},
    {L("<!DOCTYPE HTML>"), HTML},
    {L(" \t\n\f\r<!doctype html "), HTML},
    {L("<HTML>"), HTML},
    {L("<hEaD "), HTML},
    {L("<script>"), HTML},
    {L("<iframe>"), HTML},
    {L("<h1>"), HTML},
    {L("<div>"), HTML},
    {L("<font>"), HTML},
    {L("<table>"), HTML},
    {L("<a>"), HTML},
    {L("<style>"), HTML},
    {L("<title>"), HTML},
    {L("<b>"), HTML},
    {L("<body>"), HTML},
    {L("<br>"), HTML},
    {L("<p>"), HTML},
    {L("<!-- "), HTML},
    {L("<!--x"), TEXT},
    {L("<html"), TEXT},
    {L("<html\n"), TEXT},
    {L("<h2>"), TEXT},
    {L("  <?xml"), "text/xml; charset=utf-8"},
    {L("<?XML"), TEXT},
    {L("%PDF-"), "application/pdf"},
    {L(" %PDF-"), TEXT},
    {L("%!PS-Adobe-"), "application/postscript"},
    {L("\xfe\xff\0\1"), "text/plain; charset=utf-16be"},
    {L("\xff\xfe\0\1"), "text/plain; charset=utf-16le"},
    {L("\xfe\xff\0"), OCTETS},
    {L("\xef\xbb\xbf\0"), TEXT},
    {L("\0\0\1\0"), "image/x-icon"},
    {L("\0\0\2\0"), "image/x-icon"},
    {L("BM"), "image/bmp"},
    {L("GIF87a"), "image/gif"},
    {L("GIF89a"), "image/gif"},
    {L("RIFF\1\2\3\4WEBPVP"), "image/webp"},
    {L("\x89PNG\r\n\x1a\n"), "image/png"},
    {L("\xff\xd8\xff"), "image/jpeg"},
    {L("FORM\1\2\3\4AIFF"), "audio/aiff"},
    {L("ID3"), "audio/mpeg"},
    {L("OggS\0"), "application/ogg"},
    {L("MThd\0\0\0\6"), "audio/midi"},
    {L("RIFF\1\2\3\4AVI "), "video/avi"},
    {L("RIFF\1\2\3\4WAVE"), "audio/wave"},
    {L("\0\0\0\x0c"
       "ftypmp41"),
     "video/mp4"},
    {L("\0\0\0\x14"
       "ftypisomxxxxmp42"),
     "video/mp4"},
    {L("\0\0\0\x10"
       "ftypisommp42"),
     OCTETS}, /* a version number, no brand */
    {L("\0\0\0\x18"
       "ftypisomxxxxmp42"),
     OCTETS}, /* longer than there is */
    {L("\0\0\0\x0d"
       "ftypmp41x"),
     OCTETS},
    {L("\x1a\x45\xdf\xa3"), "video/webm"},
    {L("\1aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaLP"), "application/vnd.ms-fontobject"},
    {L("\0\1\0\0"), "font/ttf"},
    {L("OTTO"), "font/otf"},
    {L("ttcf"), "font/collection"},
    {L("wOFF"), "font/woff"},
    {L("wOF2"), "font/woff2"},
    {L("\x1f\x8b\x08"), "application/x-gzip"},
    {L("PK\3\4"), "application/zip"},
    {L("Rar!\x1a\7\0"), "application/x-rar-compressed"},
    {L("Rar!\x1a\7\1\0"), "application/x-rar-compressed"},
    {L("\0asm"), "application/wasm"},
    {L("hello\x1b[0m\x80\xff"), TEXT},
    {L("hello\x08"), OCTETS},
    {L("\x0b"), OCTETS},
    {L("\x0e"), OCTETS},
    {L("\x1a"), OCTETS},
    {L("\x1c"), OCTETS},
};

static void sniffing(void) {
    for (size_t i = 0; i < PV__ARRAY_LEN(sniffs); i++) {
        const uint8_t *p = t_guard_put(&in_guard, sniffs[i].data.p, sniffs[i].data.n);
        const char *got = pv_sniff(p, sniffs[i].data.n);
        check_text(__LINE__, got, strlen(got), (lit){sniffs[i].type, strlen(sniffs[i].type)});
        for (size_t n = 0; n < sniffs[i].data.n; n++) {
            CHECK(pv_sniff(t_guard_put(&in_guard, sniffs[i].data.p, n), n) != NULL);
        }
    }
    static uint8_t long_text[600];
    memset(long_text, ' ', sizeof long_text);
    long_text[512] = 0;
    CHECK(strcmp(pv_sniff(long_text, sizeof long_text), TEXT) == 0);
    long_text[511] = 0;
    CHECK(strcmp(pv_sniff(long_text, sizeof long_text), OCTETS) == 0);
}

static void lookup(const pv_mime *m, lit ext, lit want) {
    pv_text type;
    CHECK_EQ(pv_mime_lookup(m, guarded(ext), ext.n, &type), want.n != 0);
    check_text(__LINE__, type.p, type.n, want);
}

static int add(pv_mime *m, lit ext, lit type, int only_new) {
    return pv_mime_add(m, ext.p, ext.n, type.p, type.n, only_new);
}

static void extensions(void) {
    pv_mime *m;
    CHECK_EQ(pv_mime_new(&m), 0);
    CHECK_EQ(add(m, LV(".html"), LV("x/y"), 1), 0); /* built in */
    CHECK_EQ(add(m, LV(".C"), LV("text/x-c++src"), 1), 1);
    CHECK_EQ(add(m, LV(".C"), LV("text/other"), 1), 0);
    CHECK_EQ(add(m, LV(".pdf"), LV("x/replaced"), 0), 1);
    CHECK_EQ(add(m, LV(".rtf"), LV("x/rtf"), 0), 1);
    CHECK_EQ(add(m, LV(".bad"), LV("no type at all"), 0), 0);
    CHECK_EQ(add(m, LV(".up"), LV("text/X-Up"), 0), 1);
    CHECK_EQ(add(m, LV(".par"), LV("text/x;a=b"), 0), 1);
    CHECK_EQ(add(m, LV(".cs"), LV("text/x;charset=latin1"), 0), 1);
    CHECK_EQ(add(m, LV(".app"), LV("application/x;a=b"), 0), 1);
    CHECK_EQ(add(m, LV(".Mixed"), LV("x/mixed"), 0), 1);
    for (int i = 0; i < 5000; i++) { /* grows */
        char ext[16];
        int n = snprintf(ext, sizeof ext, ".e%d", i);
        CHECK_EQ(pv_mime_add(m, ext, (size_t)n, "x/y", 3, 1), 1);
    }
    CHECK_EQ(pv_mime_seal(m), 0);
    CHECK_EQ(pv_mime_seal(m), 0);
    CHECK_EQ(add(m, LV(".late"), LV("x/y"), 0), PV_EINVAL);
    static const struct {
        lit ext, type;
    } cases[] = {
        {L(".txt"), L(TEXT)},
        {L(".TXT"), L(TEXT)},
        {L(".log"), L(TEXT)},
        {L(".gitignore"), L(TEXT)},
        {L(".md"), L("text/markdown; charset=utf-8")},
        {L(".js"), L("application/javascript")},
        {L(".mjs"), L("application/javascript")},
        {L(".json"), L("application/json")},
        {L(".xml"), L("application/xml")},
        {L(".xsl"), L("text/xml; charset=utf-8")},
        {L(".ico"), L("image/x-icon")},
        {L(".webm"), L("video/webm")},
        {L(".m4a"), L("audio/mp4")},
        {L(".bin"), L(OCTETS)},
        {L(".wasm"), L("application/wasm")},
        {L(".dockerfile"), L("text/x-dockerfile; charset=utf-8")},
        {L(".c++"), L("text/x-c++; charset=utf-8")},
        {L(".docx"), L("application/vnd.openxmlformats-officedocument.wordprocessingml.document")},
        {L(".xlsx"), L("application/vnd.openxmlformats-officedocument.spreadsheetml.sheet")},
        {L(".pptx"), L("application/vnd.openxmlformats-officedocument.presentationml.presentation")},
        {L(".pdf"), L("application/pdf")}, /* upstream's own list comes last */
        {L(".rtf"), L("x/rtf")},
        {L(".C"), L("text/x-c++src; charset=utf-8")},
        {L(".c"), L("text/x-c; charset=utf-8")},
        {L(".html"), L(HTML)},
        {L(".bad"), L("")},
        {L(".up"), L("text/x-up; charset=utf-8")},
        {L(".par"), L("")}, /* Go cannot format it and keeps an empty text */
        {L(".cs"), L("text/x;charset=latin1")},
        {L(".app"), L("application/x;a=b")},
        {L(".Mixed"), L("x/mixed")},
        {L(".mIXED"), L("x/mixed")},
        {L(".e4999"), L("x/y")},
        {L(".mar\xe2\x84\xaa"
           "down"),
         L("text/markdown; charset=utf-8")}, /* KELVIN SIGN */
        {L("."), L("")},
        {L(""), L("")},
        {L("txt"), L("")},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        lookup(m, cases[i].ext, cases[i].type);
    }
    pv_mime_free(m);
    pv_mime_free(NULL);
    static const struct {
        lit name, ext;
    } names[] = {{L("a.b.c"), L(".c")}, {L(".hidden"), L(".hidden")},
                 {L("a."), L(".")},     {L("a.b/c"), L("")},
                 {L(""), L("")},        {L("abc"), L("")}};
    for (size_t i = 0; i < PV__ARRAY_LEN(names); i++) {
        pv_text ext;
        pv_name_ext(guarded(names[i].name), names[i].name.n, &ext);
        CHECK_TEXT(ext, names[i].ext);
    }
}

/* ------------------------------------------------------------------ answers to reads (6.3-6.8) */

static pv_mime *table;
static const uint8_t random30[30] = {0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
                                     0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff};
#define BOUNDARY "00112233445566778899aabbccddeeff0000000000000000000000000000"

/* What a plan gives, as one text: status, flags, header lines sorted by the order they come in, blank line, body. */
static char shown[ROOM];

static lit show(const pv_plan *plan, const char *buf, const pv_body_part *parts, const uint8_t *data) {
    int n =
        snprintf(shown, sizeof shown, "%d %x\n%.*s\n", plan->status, (unsigned)plan->flags, (int)plan->head_len, buf);
    uint64_t body = 0;
    for (size_t i = 0; i < plan->parts; i++) {
        memcpy(shown + n, buf + parts[i].text_offset, parts[i].text_len);
        n += (int)parts[i].text_len;
        if (parts[i].data_len != 0) {
            memcpy(shown + n, data + parts[i].data_offset, (size_t)parts[i].data_len);
        }
        n += (int)parts[i].data_len;
        body += parts[i].text_len + parts[i].data_len;
    }
    CHECK_EQ(body, plan->body_len);
    return (lit){shown, (size_t)n};
}

/* Asks for a plan with ample room, with the room it says it needs (at a guard page), and with every smaller one. */
static int plan(const pv_get_req *req, const pv_get_needle *n, lit *out) {
    static char buf[ROOM];
    static pv_body_part parts[16];
    pv_plan p;
    pv_errinfo err;
    int rc = pv_get_plan(req, n, table, buf, sizeof buf, parts, PV__ARRAY_LEN(parts), &p, &err);
    *out = (lit){"", 0};
    if (rc != PV_GET_DONE) {
        return rc;
    }
    *out = show(&p, buf, parts, n->data);
    size_t need = p.head_len;
    for (size_t i = 0; i < p.parts; i++) {
        need = parts[i].text_offset + parts[i].text_len > need ? parts[i].text_offset + parts[i].text_len : need;
    }
    for (size_t cap = need + 1; cap-- > 0;) {
        char *exact = (char *)out_guard.map + out_guard.room - cap;
        int again = pv_get_plan(req, n, table, exact, cap, parts, PV__ARRAY_LEN(parts), &p, &err);
        if (cap == need) {
            CHECK_EQ(again, PV_GET_DONE);
            static char first[ROOM];
            memcpy(first, shown, out->n);
            lit second = show(&p, exact, parts, n->data);
            check_text(__LINE__, second.p, second.n, (lit){first, out->n});
        } else {
            CHECK_EQ(again, PV_EBUFFER);
            CHECK(err.a >= need && err.b == p.parts);
        }
        if (need > 2000 && cap > 16 && cap < need - 200) {
            cap -= 97; /* long ones by steps */
        }
    }
    if (p.parts != 0) {
        CHECK_EQ(pv_get_plan(req, n, table, buf, sizeof buf, parts, 0, &p, &err), PV_EBUFFER);
        CHECK(err.b > 0);
    }
    return rc;
}

static pv_get_needle needle_of(lit data) {
    pv_get_needle n = {.data = (const uint8_t *)data.p, .data_len = data.n, .checksum = 0xc0ffee};
    n.last_modified_s = 1136214245;
    n.flags = PV_F_NAME | PV_F_MIME | PV_F_MTIME;
    return n;
}

#define MODIFIED "Last-Modified: Mon, 02 Jan 2006 15:04:05 GMT\r\n"
#define TAG "Etag: \"00c0ffee\"\r\n"
#define ACCEPT "Accept-Ranges: bytes\r\n"

static void check_plan(int line, const pv_get_req *req, const pv_get_needle *n, lit want) {
    lit got;
    CHECK_EQ(plan(req, n, &got), PV_GET_DONE);
    check_text(line, got.p, got.n, want);
}

#define CHECK_PLAN(req, n, want) check_plan(__LINE__, &(req), &(n), LV(want))

static void plain_answers(void) {
    pv_get_req req = {.random30 = random30};
    pv_get_needle n = needle_of(LV("hello world"));
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\n" ACCEPT "Content-Length: 11\r\n\nhello world");
    n.name = text(LV("a.json"));
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: application/json\r\n"
               "Content-Disposition: inline; filename=a.json\r\n" ACCEPT "Content-Length: 11\r\n\nhello world");
    n.mime = text(LV("application/octet-stream; x=1")); /* any text that begins so is none */
    req.flags = PV_GET_ATTACHMENT;
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: application/json\r\n"
               "Content-Disposition: attachment; filename=a.json\r\n" ACCEPT "Content-Length: 11\r\n\n"
               "hello world");
    n.mime = text(LV("image/png"));
    req.filename = text(LV("b.txt")); /* the URL's name wins, the stored type, too */
    req.flags = PV_GET_HEAD;
    req.range = text(LV("bytes=0-1"));
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: image/png\r\n"
               "Content-Disposition: inline; filename=b.txt\r\n" ACCEPT "Content-Length: 11\r\n\n");
    n = needle_of(LV("hello world"));
    n.name = text(LV("3,64deadbeef"));
    req = (pv_get_req){.flags = PV_GET_HEAD}; /* nothing is sniffed for HEAD */
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Disposition: inline; filename=\"3,64deadbeef\"\r\n" ACCEPT
               "Content-Length: 11\r\n\n");
    n.name = text(LV("x.bin")); /* a type by extension that is octet-stream is sent */
    req.flags = 0;
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: " OCTETS "\r\n"
               "Content-Disposition: inline; filename=x.bin\r\n" ACCEPT "Content-Length: 11\r\n\nhello world");
    /* an empty needle: nothing was read of it */
    pv_get_needle empty = {.data_len = 0};
    CHECK_PLAN(req, empty, "200 0\nEtag: \"00000000\"\r\n" ACCEPT "Content-Length: 0\r\n\n");
    req.range = text(LV("bytes=0-"));
    CHECK_PLAN(req, empty,
               "206 0\nEtag: \"00000000\"\r\nContent-Range: bytes 0--1/0\r\n" ACCEPT "Content-Length: 0\r\n\n");
    req = (pv_get_req){.filename = text(LV("a.json"))};
    CHECK_PLAN(req, empty,
               "200 0\nEtag: \"00000000\"\r\nContent-Type: application/json\r\n"
               "Content-Disposition: inline; filename=a.json\r\n" ACCEPT "Content-Length: 0\r\n\n");
    /* 304: Last-Modified and nothing else */
    n = needle_of(LV("hello"));
    n.flags |= PV_F_PAIRS;
    n.pairs = text(LV("{\"X\":\"1\"}"));
    req = (pv_get_req){.if_modified_since = text(LV("Mon, 02 Jan 2006 15:04:05 GMT"))};
    CHECK_PLAN(req, n, "304 0\n" MODIFIED "\n");
    n.last_modified_s = 0;
    req = (pv_get_req){.if_none_match = text(LV("\"00c0ffee\"")), .flags = PV_GET_HEAD};
    CHECK_PLAN(req, n, "304 0\n\n");
    /* an expanded chunk manifest: name and type are the manifest's, compression plays no part */
    n = needle_of(LV("chunks"));
    n.flags |= PV_F_COMPRESSED;
    n.mime = text(LV("video/mp4"));
    req = (pv_get_req){.flags = PV_GET_CHUNKED | PV_GET_HEAD};
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: video/mp4\r\n" ACCEPT "X-File-Store: chunked\r\n"
               "Content-Length: 6\r\n\n");
    /* no table: no type by extension */
    pv_mime *kept = table;
    table = NULL;
    n = needle_of(LV("hello"));
    req = (pv_get_req){.filename = text(LV("a.json")), .flags = PV_GET_HEAD};
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Disposition: inline; filename=a.json\r\n" ACCEPT
               "Content-Length: 5\r\n\n");
    table = kept;
    n.data_len = (uint64_t)INT64_MAX + 1;
    pv_plan p;
    CHECK_EQ(pv_get_plan(&req, &n, table, shown, 10, NULL, 0, &p, NULL), PV_EINVAL);
}

static void range_answers(void) {
    pv_get_req req = {.random30 = random30, .range = text(LV("bytes=0-4"))};
    pv_get_needle n = needle_of(LV("hello\1world"));
    CHECK_PLAN(req, n,
               "206 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\nContent-Range: bytes 0-4/11\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    req.range = text(LV("bytes=5-")); /* sniffed from the range's own bytes */
    CHECK_PLAN(req, n,
               "206 0\n" MODIFIED TAG "Content-Type: " OCTETS "\r\nContent-Range: bytes 5-10/11\r\n" ACCEPT
               "Content-Length: 6\r\n\n\1world");
    req.range = text(LV("bytes=11-"));
    CHECK_PLAN(req, n, "206 0\n" MODIFIED TAG "Content-Range: bytes 11-10/11\r\n" ACCEPT "Content-Length: 0\r\n\n");
    req.range = text(LV("bytes=--5"));
    CHECK_PLAN(req, n, "206 1\n" MODIFIED TAG "Content-Range: bytes 16-10/11\r\n" ACCEPT "\n");
    n.name = text(LV("n.zip"));
    n.mime = text(LV("a/b"));
    req.range = text(LV("bytes=12-"));
    CHECK_PLAN(req, n,
               "416 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\nContent-Disposition: inline; filename=n.zip\r\n" ACCEPT
               "X-Content-Type-Options: nosniff\r\nContent-Length: 14\r\n\ninvalid range\n");
    req.range = text(LV("bytes=0-1,--5"));
    CHECK_PLAN(req, n,
               "416 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\nContent-Disposition: inline; filename=n.zip\r\n" ACCEPT
               "X-Content-Type-Options: nosniff\r\nContent-Length: 13\r\n\nOut of Range\n");
    n = needle_of(LV("hello world"));
    req.range = text(LV("bytes=0-10,0-0"));
    CHECK_PLAN(req, n, "200 0\n" MODIFIED TAG ACCEPT "Content-Length: 0\r\n\n");
    req.range = text(LV("bytes=6-,0-1"));
    CHECK_PLAN(req, n,
               "206 0\n" MODIFIED TAG "Content-Type: multipart/byteranges; boundary=" BOUNDARY "\r\n" ACCEPT
               "Content-Length: 300\r\n\n"
               "--" BOUNDARY "\r\nContent-Range: bytes 6-10/11\r\nContent-Type: \r\n\r\nworld\r\n"
               "--" BOUNDARY "\r\nContent-Range: bytes 0-1/11\r\nContent-Type: \r\n\r\nhe\r\n--" BOUNDARY "--\r\n");
    n.mime = text(LV("text/plain"));
    CHECK_PLAN(req, n,
               "206 0\n" MODIFIED TAG "Content-Type: multipart/byteranges; boundary=" BOUNDARY "\r\n" ACCEPT
               "Content-Length: 320\r\n\n"
               "--" BOUNDARY "\r\nContent-Range: bytes 6-10/11\r\nContent-Type: text/plain\r\n\r\nworld\r\n"
               "--" BOUNDARY "\r\nContent-Range: bytes 0-1/11\r\nContent-Type: text/plain\r\n\r\nhe\r\n--" BOUNDARY
               "--\r\n");
    req.random30 = NULL;
    lit out;
    CHECK_EQ(plan(&req, &n, &out), PV_EINVAL);
}

static void compressed_answers(void) {
    static const uint8_t gz[] = "\x1f\x8b\x08zipped";
    lit stored = {(const char *)gz, sizeof gz - 1};
    pv_get_req req = {.random30 = random30};
    pv_get_needle n = needle_of(stored);
    n.flags |= PV_F_COMPRESSED;
    lit out;
    CHECK_EQ(plan(&req, &n, &out), PV_GET_NEED_PLAIN);
    req.accept_encoding = text(LV("br, deflate"));
    CHECK_EQ(plan(&req, &n, &out), PV_GET_NEED_PLAIN);
    req.flags = PV_GET_HEAD;
    CHECK_EQ(plan(&req, &n, &out), PV_GET_NEED_PLAIN);
    req.flags = 0;
    req.accept_encoding = text(LV("x-gzip;q=0")); /* the word is all that counts */
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Encoding: gzip\r\n" ACCEPT "Content-Length: 9\r\n\n"
               "\x1f\x8b\x08zipped");
    req.range = text(LV("bytes=0-1"));
    CHECK_PLAN(req, n,
               "206 0\n" MODIFIED TAG "Content-Encoding: gzip\r\nContent-Range: bytes 0-1/9\r\n" ACCEPT
               "Content-Length: 2\r\n\n\x1f\x8b");
    req.range = text(LV("x"));
    CHECK_PLAN(req, n,
               "416 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\nContent-Encoding: gzip\r\n" ACCEPT
               "X-Content-Type-Options: nosniff\r\nContent-Length: 14\r\n\ninvalid range\n");
    /* decompressed by the caller */
    req = (pv_get_req){.random30 = random30};
    n.data = (const uint8_t *)"<html> it";
    n.plain = 1;
    CHECK_PLAN(req, n, "200 0\n" MODIFIED TAG "Content-Type: " HTML "\r\n" ACCEPT "Content-Length: 9\r\n\n<html> it");
    /* flagged, but no gzip: as stored, whatever the client accepts */
    n = needle_of(LV("plain"));
    n.flags |= PV_F_COMPRESSED;
    req.accept_encoding = text(LV("gzip"));
    CHECK_PLAN(req, n, "200 0\n" MODIFIED TAG "Content-Type: " TEXT "\r\n" ACCEPT "Content-Length: 5\r\n\nplain");
    n.data = NULL;
    CHECK_EQ(plan(&req, &n, &out), PV_EINVAL);
    /* 304 comes before all that */
    req.if_none_match = text(LV("\"00c0ffee\""));
    CHECK_PLAN(req, n, "304 0\n" MODIFIED "\n");
    /* several ranges of an encoded body: a length only if it is small */
    static char big[4000];
    memset(big, 'z', sizeof big);
    memcpy(big, gz, 3);
    n = needle_of((lit){big, sizeof big});
    n.flags |= PV_F_COMPRESSED;
    req = (pv_get_req){.random30 = random30, .accept_encoding = text(LV("gzip")), .range = text(LV("bytes=0-9,0-0"))};
    CHECK_EQ(plan(&req, &n, &out), PV_GET_DONE);
    CHECK(memmem(out.p, out.n, "\r\nContent-Length: ", 18) != NULL);
    CHECK(memcmp(out.p, "206 0\n", 6) == 0);
    int lengths = 0;
    for (int end = 1600; end < 2000; end++) { /* up to 2048 bytes of body Go's library counts them */
        char header_text[32];
        static char buf[4096];
        pv_body_part parts[4];
        pv_plan p;
        int n_text = snprintf(header_text, sizeof header_text, "bytes=0-%d,1-1", end);
        req.range = (pv_text){header_text, (size_t)n_text};
        CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 4, &p, NULL), PV_GET_DONE);
        int has_length = memmem(buf, p.head_len, "\r\nContent-Length: ", 18) != NULL;
        CHECK_EQ(has_length, p.body_len <= 2048);
        CHECK_EQ(p.flags, has_length ? 0 : PV_PLAN_NO_LENGTH);
        lengths += has_length;
    }
    CHECK(lengths > 0 && lengths < 400);
    n = needle_of((lit){big, 2}); /* the magic alone is gzip, too; one byte is not */
    n.flags |= PV_F_COMPRESSED;
    req = (pv_get_req){.flags = PV_GET_HEAD};
    CHECK_EQ(plan(&req, &n, &out), PV_GET_NEED_PLAIN);
    n.data_len = 1;
    CHECK_EQ(plan(&req, &n, &out), PV_GET_DONE);
}

static void streamed_answers(void) {
    static char data[3000];
    memset(data, 'a', sizeof data);
    data[1500] = 1;
    pv_get_req req = {.random30 = random30};
    pv_get_needle n = needle_of((lit){data, sizeof data});
    n.data = NULL;
    static char buf[1024];
    pv_body_part parts[2];
    pv_plan p;
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_NEED_SNIFF);
    CHECK(p.need_offset == 0 && p.need_len == 512);
    req.range = text(LV("bytes=1400-1599"));
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_NEED_SNIFF);
    CHECK(p.need_offset == 1400 && p.need_len == 200);
    n.sniff = (const uint8_t *)data + 1400;
    n.sniff_offset = 1400;
    n.sniff_len = 199; /* too short, or elsewhere: asks again */
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_NEED_SNIFF);
    n.sniff_offset = 1401;
    n.sniff_len = 300;
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_NEED_SNIFF);
    n.sniff = (const uint8_t *)t_guard_put(&in_guard, data + 1390, 210);
    n.sniff_offset = 1390;
    n.sniff_len = 210;
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_DONE);
    CHECK(memmem(buf, p.head_len, "Content-Type: " OCTETS "\r\n", 40) != NULL);
    CHECK(p.parts == 1 && parts[0].data_offset == 1400 && parts[0].data_len == 200 && parts[0].text_len == 0);
    n.sniff = NULL;
    n.mime = text(LV("text/plain")); /* nothing to sniff with a type, an encoding, no body, or HEAD */
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_DONE);
    n.mime.n = 0;
    req.overrides[PV_OVR_CONTENT_ENCODING] = text(LV("br"));
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_DONE);
    req.overrides[PV_OVR_CONTENT_ENCODING] = (pv_text){"", 0};
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_NEED_SNIFF);
    req.overrides[PV_OVR_CONTENT_TYPE] = (pv_text){"", 0};
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_DONE);
    req = (pv_get_req){.flags = PV_GET_HEAD};
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 2, &p, NULL), PV_GET_DONE);
}

static void override_answers(void) {
    pv_get_req req = {.random30 = random30};
    pv_get_needle n = needle_of(LV("hello"));
    n.name = text(LV("a.txt"));
    req.overrides[PV_OVR_CACHE_CONTROL] = text(LV("no-cache"));
    req.overrides[PV_OVR_CONTENT_DISPOSITION] = text(LV(" x; y\t"));
    req.overrides[PV_OVR_CONTENT_ENCODING] = text(LV("br"));
    req.overrides[PV_OVR_CONTENT_LANGUAGE] = text(LV("de"));
    req.overrides[PV_OVR_CONTENT_TYPE] = text(LV("z"));
    req.overrides[PV_OVR_EXPIRES] = text(LV("a\r\nSet-Cookie: b\n"));
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: z\r\nContent-Disposition: x; y\r\nContent-Encoding: br\r\n"
               "Content-Language: de\r\nCache-Control: no-cache\r\nExpires: a  Set-Cookie: b\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    for (size_t i = 0; i < 6; i++) {
        req.overrides[i] = (pv_text){"", 0}; /* given, but empty */
    }
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: \r\nContent-Disposition: inline; filename=a.txt\r\n"
               "Content-Encoding: \r\nContent-Language: \r\nCache-Control: \r\nExpires: \r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
}

static void pair_answers(void) {
    pv_get_req req = {.random30 = random30};
    pv_get_needle n = needle_of(LV("hello"));
    n.flags |= PV_F_PAIRS;
    n.pairs =
        text(LV("{\"foo-BAR\":\"v1\",\"X\":\"\\u003ca\\u0026b\\u003e\\n\\ud83d\\ude00 \",\"\":\"no\",\"b d\":\"no\"}"));
    CHECK_PLAN(req, n,
               "200 0\nFoo-Bar: v1\r\nX: <a&b> \xf0\x9f\x98\x80\r\n" MODIFIED TAG "Content-Type: " TEXT "\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    /* they override what the handler set before, and give way to what it sets after */
    n.pairs = text(LV("{\"Etag\":\"e\",\"last-modified\":\"l\",\"Content-Disposition\":\"d\",\"Content-Type\":\"t\","
                      "\"Accept-Ranges\":\"none\",\"Content-Length\":\"1\",\"Transfer-Encoding\":\"x\"}"));
    n.name = text(LV("noext"));
    CHECK_PLAN(req, n,
               "200 0\nLast-Modified: l\r\nEtag: e\r\nContent-Type: t\r\nContent-Disposition: d\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    n.name = text(LV("a.json"));
    n.pairs = text(LV("{\"Content-Type\":\"t\",\"Content-Disposition\":\"\"}"));
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Type: application/json\r\n"
               "Content-Disposition: inline; filename=a.json\r\n" ACCEPT "Content-Length: 5\r\n\nhello");
    /* repeated names: the last one counts, whatever its case */
    n.name.n = 0;
    n.mime = text(LV("t/t"));
    n.pairs = text(LV("{\"a\":\"1\",\"B\":\"2\",\"A\":\"3\",\"etag\":\"x\",\"c\":1,\"ETAG\":\"y\",\"b\":\"\"}"));
    CHECK_PLAN(req, n,
               "200 0\nA: 3\r\nC: \r\nB: \r\n" MODIFIED "Etag: y\r\nContent-Type: t/t\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    /* what the lane would add itself */
    n.pairs =
        text(LV("{\"server\":\"s\",\"date\":\"d\",\"X-Amz-Request-Id\":\"r\",\"Access-Control-Allow-Origin\":\"o\","
                "\"Access-Control-Allow-Credentials\":\"c\",\"Connection\":\"\\u0063lose\"}"));
    CHECK_PLAN(req, n,
               "200 fe\n" MODIFIED TAG "Content-Type: t/t\r\n" ACCEPT
               "Content-Length: 5\r\nServer: s\r\nDate: d\r\nX-Amz-Request-Id: r\r\n"
               "Access-Control-Allow-Origin: o\r\nAccess-Control-Allow-Credentials: c\r\nConnection: close\r\n\n"
               "hello");
    n.pairs = text(LV("{\"Connection\":\"closed\"}"));
    CHECK_PLAN(req, n,
               "200 40\n" MODIFIED TAG "Content-Type: t/t\r\n" ACCEPT
               "Content-Length: 5\r\nConnection: closed\r\n\nhello");
    n.pairs = text(LV("{\"Content-Encoding\":\"gzip\",\"Content-Range\":\"x\"}"));
    n.mime.n = 0;
    CHECK_PLAN(req, n,
               "200 0\n" MODIFIED TAG "Content-Encoding: gzip\r\nContent-Range: x\r\n" ACCEPT
               "Content-Length: 5\r\n\nhello");
    n.mime = text(LV("t/t"));
    static const lit broken[] = {L(""),       L("{"), L("{\"a\":\"b\"}x"), L("[]"), L("null"), L("{\"a\":\"b\",}"),
                                 L("{'a':1}")};
    for (size_t i = 0; i < PV__ARRAY_LEN(broken); i++) {
        n.pairs = text(broken[i]);
        CHECK_PLAN(req, n, "200 0\n" MODIFIED TAG "Content-Type: t/t\r\n" ACCEPT "Content-Length: 5\r\n\nhello");
    }
    n.flags &= (uint8_t)~PV_F_PAIRS;
    n.pairs = text(LV("{\"a\":\"b\"}"));
    CHECK_PLAN(req, n, "200 0\n" MODIFIED TAG "Content-Type: t/t\r\n" ACCEPT "Content-Length: 5\r\n\nhello");
    /* very many of them, each twice */
    static char json[60000];
    size_t len = 0;
    for (int i = 0; i < 3000; i++) {
        len +=
            (size_t)snprintf(json + len, sizeof json - len, "%s\"K%d\":\"%d\"", i == 0 ? "{" : ",", i % 1500, i / 1500);
    }
    json[len++] = '}';
    n.flags |= PV_F_PAIRS;
    n.pairs = (pv_text){json, len};
    static char buf[ROOM];
    pv_body_part parts[1];
    pv_plan p;
    CHECK_EQ(pv_get_plan(&req, &n, table, buf, sizeof buf, parts, 1, &p, NULL), PV_GET_DONE);
    size_t lines = 0;
    for (size_t i = 0; i < p.head_len; i++) {
        lines += buf[i] == '\n';
    }
    CHECK_EQ(lines, 1500 + 5);
    CHECK(memmem(buf, p.head_len, ": 0\r\n", 5) == NULL);
}

/* ------------------------------------------------------------------ uploads (8) */

static void form_checks(void) {
    static const struct {
        lit type;
        int rc;
        lit message;
    } cases[] = {
        {L(""), 0, L("")},
        {L("text/plain"), 0, L("")},
        {L("application/x-www-form-urlencoded"), 1, L("")},
        {L(" Application/X-WWW-Form-Urlencoded ; charset=x;"), 1, L("")},
        {L("application/x-www-form-urlencoded2"), 0, L("")},
        {L("appl\xc4\xb0"
           "cation/x-www-form-urlencoded"),
         1, L("")}, /* dotted capital I, lower-cased by Go */
        {L(";;"), PV_EPARSE, L("mime: no media type")},
        {L("text/plain; charset"), PV_EPARSE, L("mime: invalid media parameter")},
        {L("text/plain; a=1; a=2"), PV_EPARSE, L("mime: duplicate parameter name")},
        {L("text/plain; a=1; A=\"1\""), 0, L("")},
        {L("text plain"), PV_EPARSE, L("mime: expected slash after first token")},
        {L("text/"), PV_EPARSE, L("mime: expected token after slash")},
        {L("text/plain/x"), PV_EPARSE, L("mime: unexpected content after media subtype")},
        {L("text/plain;"), 0, L("")},
        {L("text/plain; ;"), PV_EPARSE, L("mime: invalid media parameter")},
        {L("text/plain; a=\"b"), PV_EPARSE, L("mime: invalid media parameter")},
        {L("text/plain; a="), PV_EPARSE, L("mime: invalid media parameter")},
        {L("text"), 0, L("")},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        for (size_t n = 0; n <= cases[i].type.n; n++) {
            pv_text message;
            int rc = pv_form_check(guarded((lit){cases[i].type.p, n}), n, &message);
            CHECK(rc == 0 || rc == 1 || (rc == PV_EPARSE && message.n != 0));
            if (n == cases[i].type.n) {
                CHECK_EQ(rc, cases[i].rc);
                CHECK_TEXT(message, cases[i].message);
            }
        }
    }
    static char many[4096]; /* bounded: more parameters than any client sends are refused */
    size_t len = (size_t)snprintf(many, sizeof many, "a/b");
    for (int i = 0; i < 129; i++) {
        len += (size_t)snprintf(many + len, sizeof many - len, ";p%d=x", i);
        pv_text message;
        CHECK_EQ(pv_form_check(many, len, &message), i < 128 ? 0 : PV_EPARSE);
    }
}

static pv_upload_req raw_request(lit type, lit disposition, lit body) {
    return (pv_upload_req){.method = text(LV("PUT")),
                           .content_type = text(type),
                           .content_disposition = text(disposition),
                           .path = text(LV("/3,64deadbeef")),
                           .body = (const uint8_t *)body.p,
                           .body_len = body.n,
                           .size_limit = 1 << 20,
                           .mime = table};
}

static void raw_uploads(void) {
    static const struct {
        lit type, disposition, path, name, mime;
    } cases[] = {
        {L("text/plain; x=y"), L(""), L("/3,64deadbeef"), L("3,64deadbeef"), L("text/plain; x=y")},
        {L(OCTETS), L(""), L("/3,64deadbeef.txt"), L("3,64deadbeef.txt"), L(OCTETS)},
        {L(""), L(""), L("/3,64deadbeef.JS"), L("3,64deadbeef.JS"), L("application/javascript")},
        {L(""), L(""), L("/3,64deadbeef.bin"), L("3,64deadbeef.bin"), L("")},
        {L(""), L(""), L("/3,64deadbeef/"), L("3,64deadbeef"), L("")},
        {L(""), L("attachment; filename=a.json"), L("/x"), L("a.json"), L("application/json")},
        {L(""), L("filename=a.json"), L("/x"), L("a.json"), L("application/json")},
        {L(""), L("inline; name=n.css"), L("/x"), L("n.css"), L("text/css; charset=utf-8")},
        {L(""), L("inline; name=n; filename=f"), L("/x"), L("f"), L("")},
        {L(""), L("inline; name=n; filename=\"\""), L("/x"), L("x"), L("")},
        {L(""), L("form-data; name=n; filename=f"), L("/x"), L("x"), L("")}, /* unparsable behind the prefix */
        {L(""), L("attachment; filename=a/b"), L("/x"), L("x"), L("")},
        {L(""), L("attachment; filename=\"a/b.md/\""), L("/x"), L("b.md"), L("text/markdown; charset=utf-8")},
        {L(""), L("attachment; filename=\"c:\\dir\\f.txt\""), L("/x"), L("f.txt"), L(TEXT)},
        {L(""), L("attachment; filename=\"\\\\\""), L("/x"), L("/"), L("")},
        {L(""), L("attachment; filename=\"a\\\"b\""), L("/x"), L("a\"b"), L("")},
        {L(""), L("attachment; name=x; filename*=utf-8''%e4%bd%a0.gif"), L("/x"), L("\xe4\xbd\xa0.gif"),
         L("image/gif")},
        {L(""), L("attachment; filename*=utf-8''%e4%bd%a0.gif"), L("/x"), L("x"), L("")}, /* has no "name=" */
        {L(""), L("attachment; name=x; filename*0=\"a b\"; filename*1*=%2e; filename*2=go"), L("/x"), L("a b.go"),
         L("text/x-go; charset=utf-8")},
        {L(""), L("attachment; filename=p.rb; filename*=latin1''q"), L("/x"), L("p.rb"),
         L("text/x-ruby; charset=utf-8")},
        {L(""), L("attachment; name=x; filename*=utf-8''%zz"), L("/x"), L("x"), L("")},
        {L(""), L("attachment; name=n; filename*=utf-8"), L("/x"), L("n"), L("")},
        {L(""), L("attachment; name=n; filename*0*=utf-8'en'%61; filename*1=%62"), L("/x"), L("a%62"), L("")},
        {L(""), L("attachment; name=n; filename*0*=%61; filename*1=b"), L("/x"), L("b"), L("")},
        {L(""), L("attachment; name=n; filename*0=a; filename*1*=%6"), L("/x"), L("a"), L("")},
        {L(""), L("attachment; name=n; filename*1=b"), L("/x"), L("n"), L("")},
        {L(""), L("attachment; filename=a.UPPERONLY"), L("/x"), L("a.UPPERONLY"), L("x/upper")},
        {L(""), L("attachment; filename=.png"), L("/x"), L(".png"), L("")}, /* a leading dot begins no extension */
        {L("application/json"), L("attachment; filename=a.json"), L("/x"), L("a.json"), L("application/json")},
        {L("text/x"), L(""), L(""), L("."), L("text/x")},
        {L("text/x"), L(""), L("/"), L("/"), L("text/x")},
    };
    pv_mime *own;
    CHECK_EQ(pv_mime_new(&own), 0);
    CHECK_EQ(add(own, LV(".UpperOnly"), LV("x/upper"), 0), 1); /* known by its lower-case form alone */
    CHECK_EQ(pv_mime_seal(own), 0);
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        pv_upload_req req = raw_request(cases[i].type, cases[i].disposition, LV("data"));
        req.mime = own;
        req.path = text(cases[i].path);
        for (size_t cap = 0; cap < 100; cap++) { /* the scratch may be too small, never overrun */
            char *scratch = (char *)out_guard.map + out_guard.room - cap;
            pv_upload up;
            pv_errinfo err;
            int rc = pv_upload_parse(&req, scratch, cap, &up, &err);
            if (rc == PV_EBUFFER) {
                CHECK(cap < 99 && err.a >= 2 * cap);
                continue;
            }
            CHECK_EQ(rc, 0);
            CHECK_TEXT(up.name, cases[i].name);
            CHECK_TEXT(up.mime, cases[i].mime);
            CHECK(up.data == req.body && up.data_len == 4 && !up.is_multipart && !up.is_gzipped && !up.quoted);
        }
    }
    pv_mime_free(own);
    pv_upload_req req = raw_request(LV(OCTETS), LV(""), LV("12345"));
    pv_upload up;
    char scratch[4096];
    req.size_limit = 5;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    req.size_limit = 4;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("file over the limited 4 bytes"));
    req.size_limit = 5;
    req.content_encoding = text(LV("gzip"));
    req.content_md5 = text(LV("abc"));
    req.is_manifest = 1;
    req.content_type = text(LV(""));
    req.path = text(LV("/3,64.json"));
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    CHECK(up.is_gzipped);
    CHECK_TEXT(up.md5, LV("abc"));
    CHECK_TEXT(up.mime, LV("")); /* a manifest gets no type by extension */
    req.content_encoding = text(LV("GZIP"));
    CHECK_EQ(pv_upload_parse(&req, NULL, 0, &up, NULL), 0);
    CHECK(!up.is_gzipped);
    /* which requests are multipart: POST without a type or with form-data in it, never PUT */
    req = raw_request(LV("multipart/form-data; boundary=b"), LV(""), LV("--b\r\n\r\nx\r\n--b--"));
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    CHECK(!up.is_multipart && up.data_len == req.body_len);
    req.method = text(LV("POST"));
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    CHECK(up.is_multipart && up.data_len == 1);
}

#define CT "multipart/form-data; boundary=b"

static const struct upload_case {
    lit type;
    lit body;
    int rc;
    lit data, name, mime, md5;
    int gzipped;
    lit message;
} upload_cases[] = {
    {L(CT),
     L("--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"h.txt\"\r\nContent-Type: text/plain\r\n\r\n"
       "hello\r\n--b--\r\n"),
     0, L("hello"), L("h.txt"), L("text/plain"), L(""), 0, L("")},
    /* the first part is the data, whatever its name */
    {L(CT),
     L("--b\r\nContent-Disposition: form-data; name=note\r\n\r\nabc\r\n--b\r\nContent-Disposition: form-data; "
       "name=note2\r\n\r\ndef\r\n--b--\r\n"),
     0, L("abc"), L(""), L(""), L(""), 0, L("")},
    /* without a file name the first later part with one takes over */
    {L(CT),
     L("--b\r\nContent-Type: a/a\r\nContent-MD5: m1\r\n\r\nabc\r\n--b\r\n\r\nxx\r\n--b\r\n"
       "Content-Disposition: form-data; filename=f.css\r\nContent-Encoding: gzip\r\nContent-MD5: m2\r\n\r\n"
       "def\r\n--b\r\nContent-Disposition: form-data; filename=g\r\n\r\nno\r\n--b--"),
     0, L("def"), L("f.css"), L("text/css; charset=utf-8"), L("m2"), 1, L("")},
    /* trouble behind the first part leaves it in place */
    {L(CT), L("--b\r\nContent-Type: a/a\r\nContent-MD5: m1\r\n\r\nabc\r\n--b\r\nbad\r\n\r\n"), 0, L("abc"), L(""),
     L("a/a"), L("m1"), 0, L("")},
    {L(CT), L("--b\r\n\r\nabc\r\n--b"), 0, L("abc"), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\nabc\r\n--b\r\n\r\nxx"), 0, L("abc"), L(""), L(""), L(""), 0, L("")},
    /* preamble, epilogue, blanks behind boundaries, LF line ends */
    {L(CT), L("pre\r\namble\r\n--b \t\r\n\r\nabc\r\n--b-- \r\nepilogue"), 0, L("abc"), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("pre\n--b\nContent-Type: x/y\n\nab\r\n\nc\n--b--\n"), 0, L("ab\r\n\nc"), L(""), L("x/y"), L(""), 0,
     L("")},
    {L(CT), L("--b\r\n\r\na\n--b\nc\r\n--b--"), 0, L("a\n--b\nc"), L(""), L(""), L(""), 0, L("")},
    /* what looks like a boundary */
    {L(CT), L("--b\r\n\r\na\r\n--bc\r\n--\r\n-b\r\n--b-c\r\n--b--"), 0, L("a\r\n--bc\r\n--\r\n-b\r\n--b-c"), L(""),
     L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\n--bx\r\n--b--"), 0, L("--bx"), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\n--b--"), 0, L(""), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\n\r\n--b--"), 0, L(""), L(""), L(""), L(""), 0, L("")},
    /* quoted and odd boundaries, multipart/mixed */
    {L("multipart/form-data; boundary=\"a b\""), L("--a b\r\n\r\nx\r\n--a b--"), 0, L("x"), L(""), L(""), L(""), 0,
     L("")},
    {L("multipart/mixed; x=form-data; boundary=b"), L("--b\r\n\r\nx\r\n--b--"), 0, L("x"), L(""), L(""), L(""), 0,
     L("")},
    {L("Multipart/Form-Data; BOUNDARY*=utf-8''%62; x=form-data"), L("--b\r\n\r\nx\r\n--b--"), 0, L("x"), L(""), L(""),
     L(""), 0, L("")},
    /* names and types */
    {L(CT),
     L("--b\r\nContent-Disposition: form-data; filename=\"C:\\dir\\f.bin\"\r\nContent-Type: " OCTETS
       "\r\n\r\nx\r\n--b--"),
     0, L("x"), L("f.bin"), L(""), L(""), 0, L("")},
    {L(CT),
     L("--b\r\nContent-Disposition: form-data; filename=\"a/b/c.JS\"\r\nContent-Type: " OCTETS "\r\n\r\nx\r\n--b--"), 0,
     L("x"), L("c.JS"), L("application/javascript"), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Disposition: form-data; filename*=utf-8''%c3%a9.html\r\n\r\nx\r\n--b--"), 0, L("x"),
     L("\xc3\xa9.html"), L(HTML), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Disposition: form-data; filename=\"a/\\\\\"\r\n\r\nx\r\n--b--"), 0, L("x"), L("/"), L(""),
     L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Disposition: form-data; filename=x; filename=y\r\n\r\nx\r\n--b--"), 0, L("x"), L(""),
     L(""), L(""), 0, L("")},
    /* folded headers, the first of a name, blanks around values, odd cases */
    {L(CT),
     L("--b\r\ncontent-disposition: form-data;\r\n\t filename=fold.txt\r\nCONTENT-TYPE:  a/b \r\n ; c=d\r\n"
       "Content-Type: no/no\r\nContent-Encoding : gzip\r\n\r\nx\r\n--b--"),
     0, L("x"), L("fold.txt"), L("a/b ; c=d"), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Type:\r\nContent-Type: a/b\r\n\r\nx\r\n--b--"), 0, L("x"), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Encoding: GZIP\r\n\r\nx\r\n--b--"), 0, L("x"), L(""), L(""), L(""), 0, L("")},
    /* refusals */
    {L(""), L("--b\r\n\r\nx\r\n--b--"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("request Content-Type isn't multipart/form-data")},
    {L("x/form-data; boundary=b"), L(""), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("request Content-Type isn't multipart/form-data")},
    {L("multipart/form-data"), L(""), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("no multipart boundary param in Content-Type")},
    {L("multipart/form-data; boundary=\"\""), L("--\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("multipart: boundary is empty")},
    {L(CT), L("no boundary here\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("multipart: NextPart: EOF")},
    {L(CT), L(""), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("multipart: NextPart: EOF")},
    {L(CT), L("--b--\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("EOF")},
    {L(CT), L("--b--"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("EOF")},
    {L(CT), L("--b\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("EOF")},
    {L(CT), L("--b\r\nA: b\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("EOF")},
    {L(CT), L("--b\r\n\r\nabc"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("unexpected EOF")},
    {L(CT), L("--b\r\n\r\nabc\r\n--"), PV_EPARSE, L(""), L(""), L(""), L(""), 0, L("unexpected EOF")},
    {L(CT), L("--b\r\n lead: x\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("malformed MIME header initial line: \" lead: x\"")},
    {L(CT), L("--b\r\nno colon\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("malformed MIME header: missing colon: \"no colon\"")},
    {L(CT), L("--b\r\n: x\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("malformed MIME header line: \": x\"")},
    {L(CT), L("--b\r\nx-FOO: \x01\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("malformed MIME header line: \"X-Foo: \\x01\"")},
    {L(CT), L("--b\r\nA\xff: x\r\n\r\n"), PV_EPARSE, L(""), L(""), L(""), L(""), 0,
     L("malformed MIME header line: \"A\\xff: x\"")},
    /* between parts */
    {L(CT), L("--b\r\n\r\nx\r\n--b junk\r\n--b\r\nContent-Disposition: f; filename=y\r\n\r\ny\r\n--b--"), 0, L("x"),
     L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\n--b-- junk\r\n--b\r\nContent-Disposition: f; filename=y\r\n\r\ny\r\n--b--"), 0, L(""), L(""),
     L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\n\r\nx\r\n--b\r\nContent-Disposition: f; filename=y\r\n\r\ny"), PV_EPARSE, L(""), L(""), L(""),
     L(""), 0, L("unexpected EOF")},
    {L(CT),
     L("--b\r\n\r\nx\r\n--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n\x01\r\n--b\r\n"
       "Content-Disposition: f; filename=y\r\n\r\ny\r\n--b--"),
     0, L("y"), L("y"), L(""), L(""), 0, L("")},
    /* quoted-printable parts */
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na= \t\nb= \r\nc=\r\n--b--"), 0, L("abc"),
     L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=\r\n--b--"), PV_EPARSE, L(""), L(""), L(""),
     L(""), 0, L("quotedprintable: invalid bytes after =: \"\"")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: Quoted-Printable\r\n\r\na=41=\r\nb=\n \t\r\n=zz\xff \r\n--b--"), 0,
     L("aAb\r\n=zz\xff"), L(""), L(""), L(""), 0, L("")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na\x01\r\n--b--"), PV_EPARSE, L(""), L(""),
     L(""), L(""), 0, L("quotedprintable: invalid unescaped byte 0x01 in body")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na=\r \r\n--b--"), PV_EPARSE, L(""), L(""),
     L(""), L(""), 0, L("quotedprintable: invalid bytes after =: \"\\r \"")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na=\rxy\r\n--b--"), PV_EPARSE, L(""), L(""),
     L(""), L(""), 0, L("quotedprintable: invalid hex byte 0x0d")},
    {L(CT), L("--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\na==\r\nx\r\n--b--"), PV_EPARSE, L(""), L(""),
     L(""), L(""), 0, L("unexpected EOF")},
};

static void multipart_uploads(void) {
    static char scratch[4096];
    static uint8_t decoded[4096];
    for (size_t i = 0; i < PV__ARRAY_LEN(upload_cases); i++) {
        const struct upload_case *c = &upload_cases[i];
        pv_upload_req req = {
            .method = text(LV("POST")), .content_type = text(c->type), .path = text(LV("/3,64deadbeef"))};
        req.size_limit = 1000;
        req.mime = table;
        for (size_t n = 0; n <= c->body.n; n++) {
            req.body = t_guard_put(&in_guard, c->body.p, n);
            req.body_len = n;
            pv_upload up;
            pv_errinfo err;
            int rc = pv_upload_parse(&req, scratch, sizeof scratch, &up, &err);
            CHECK(rc == 0 || (rc == PV_EPARSE && up.message.n != 0));
            if (n < c->body.n) {
                continue;
            }
            if (rc != c->rc) {
                fprintf(stderr, "case %zu: %.*s\n", i, (int)up.message.n, up.message.p);
            }
            CHECK_EQ(rc, c->rc);
            CHECK_TEXT(up.message, c->message);
            if (rc != 0) {
                continue;
            }
            CHECK_TEXT(up.name, c->name);
            CHECK_TEXT(up.mime, c->mime);
            CHECK_TEXT(up.md5, c->md5);
            CHECK_EQ(up.is_gzipped, c->gzipped);
            CHECK(up.is_multipart);
            if (up.quoted) {
                size_t len;
                CHECK_EQ(up.decoded_len, c->data.n);
                CHECK_EQ(pv_qp_decode(up.data, up.data_len, decoded, up.decoded_len, &len), 0);
                check_text(__LINE__, (char *)decoded, len, c->data);
                CHECK_EQ(pv_qp_decode(up.data, up.data_len, decoded, up.decoded_len - 1, &len), PV_EBUFFER);
                memcpy(decoded, up.data, up.data_len); /* in place */
                CHECK_EQ(pv_qp_decode(decoded, up.data_len, decoded, sizeof decoded, &len), 0);
                check_text(__LINE__, (char *)decoded, len, c->data);
            } else {
                CHECK_EQ(up.decoded_len, up.data_len);
                check_text(__LINE__, (const char *)up.data, up.data_len, c->data);
            }
        }
        for (size_t cap = 0; cap < 200; cap++) {
            pv_upload up;
            pv_errinfo err;
            int rc = pv_upload_parse(&req, (char *)out_guard.map + out_guard.room - cap, cap, &up, &err);
            CHECK(rc == c->rc || (rc == PV_EBUFFER && err.a >= 2 * cap));
        }
    }
}

static void upload_limits(void) {
    static char body[16384];
    static char scratch[65536];
    pv_upload_req req = {.method = text(LV("POST")), .content_type = text(LV(CT)), .path = text(LV("/x"))};
    pv_upload up;
    req.body = (const uint8_t *)body;
    req.body_len = (size_t)snprintf(body, sizeof body, "--b\r\n\r\n12345\r\n--b--");
    req.size_limit = 5;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    req.size_limit = 4;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("file over the limited 4 bytes"));
    req.body_len -= 7; /* not ended: too long is what counts */
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("file over the limited 4 bytes"));
    req.body_len = (size_t)snprintf(body, sizeof body,
                                    "--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=41=42=43\r\n--b--");
    req.size_limit = 3; /* of the decoded bytes */
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), 0);
    req.size_limit = 2;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("file over the limited 2 bytes"));
    req.body_len = (size_t)snprintf(body, sizeof body,
                                    "--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n=41=42\x01\r\n--b--");
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE); /* the fault lies within it */
    CHECK_TEXT(up.message, LV("quotedprintable: invalid unescaped byte 0x01 in body"));
    req.size_limit = 1;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE); /* and here behind it */
    CHECK_TEXT(up.message, LV("file over the limited 1 bytes"));
    req.size_limit = 1 << 20;
    for (int line = 4094; line <= 4097; line++) { /* a preamble line must fit Go's buffer, line end included */
        int n = snprintf(body, sizeof body, "%0*d\r\n--b\r\n\r\nx\r\n--b--", line - 2, 0);
        req.body_len = (size_t)n;
        int rc = pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL);
        CHECK_EQ(rc, line <= 4096 ? 0 : PV_EPARSE);
        if (rc != 0) {
            CHECK_TEXT(up.message, LV("multipart: NextPart: bufio: buffer full"));
        }
        n = snprintf(body, sizeof body, "--b\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n%0*d\r\n\r\n--b--",
                     line - 2, 0);
        req.body_len = (size_t)n;
        rc = pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL);
        CHECK_EQ(rc, line <= 4096 ? 0 : PV_EPARSE);
        if (rc != 0) {
            CHECK_TEXT(up.message, LV("bufio: buffer full"));
        }
    }
    for (int line = 80; line <= 81; line++) { /* how much of a bad first line Go quotes */
        req.body_len = (size_t)snprintf(body, sizeof body, "--b\r\n %0*d\r\n\r\nx\r\n--b--", line - 1, 0);
        CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
        if (line == 81) {
            CHECK_TEXT(up.message, LV("multipart: message too large"));
        } else {
            CHECK_EQ(up.message.n, 37 + 80 + 1);
        }
    }
    /* a header as long as Go's memory allows, and ten thousand of them */
    size_t big = 11 * 1024 * 1024;
    char *huge = malloc(big);
    CHECK(huge != NULL);
    size_t n = (size_t)snprintf(huge, big, "--b\r\nA: ");
    memset(huge + n, 'x', big - n);
    memcpy(huge + big - 14, "\r\n\r\nx\r\n--b--", 12);
    req.body = (const uint8_t *)huge;
    req.body_len = big - 2;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("multipart: message too large"));
    n = (size_t)snprintf(huge, big, "--b\r\nA: b\r\n ");
    memset(huge + n, 'x', big - n);
    memcpy(huge + big - 14, "\r\n\r\nx\r\n--b--", 12); /* a continuation that long */
    char *room = malloc(big);
    CHECK(room != NULL);
    CHECK_EQ(pv_upload_parse(&req, room, big, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("multipart: message too large"));
    free(room);
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    n = (size_t)snprintf(huge, big, "--b\r\n");
    for (int i = 0; i < 10; i++) { /* many of a megabyte each */
        huge[n] = 'a';
        huge[n + 1] = ':';
        memset(huge + n + 2, 'x', 1024 * 1024 + 64 * 1024);
        memcpy(huge + n + 2 + 1024 * 1024 + 64 * 1024, "\r\n", 2);
        n += 4 + 1024 * 1024 + 64 * 1024;
    }
    req.body_len = n;
    CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), PV_EPARSE);
    CHECK_TEXT(up.message, LV("multipart: message too large"));
    for (int count = 10000; count <= 10001; count++) {
        n = (size_t)snprintf(huge, big, "--b\r\n");
        for (int i = 0; i < count; i++) {
            memcpy(huge + n, "a:\r\n", 4);
            n += 4;
        }
        n += (size_t)snprintf(huge + n, big - n, "\r\nx\r\n--b--");
        req.body_len = n;
        CHECK_EQ(pv_upload_parse(&req, scratch, sizeof scratch, &up, NULL), count == 10000 ? 0 : PV_EPARSE);
    }
    CHECK_TEXT(up.message, LV("multipart: message too large"));
    free(huge);
}

static void compression(void) {
    static const struct {
        lit name, mime, data;
        int want;
    } cases[] = {
        {L("x"), L("text/plain; charset=x"), L(""), 1},
        {L("x"), L("Text/plain"), L(""), 0},
        {L(".svg"), L("a/b"), L(""), 1},
        {L("a.svg"), L("image/svg+xml"), L(""), 0},
        {L(".bmp"), L("image/bmp"), L(""), 1},
        {L(".wav"), L(""), L("\x01"), 1},
        {L(".zip"), L("application/xml"), L(""), 0},
        {L(".jpeg"), L("application/xml"), L(""), 0},
        {L(".json"), L("a/b"), L(""), 1},
        {L("a.json"), L("application/json"), L(""), 0},
        {L(".hpp"), L("a/b"), L(""), 1},
        {L("dir/.go"), L("a/b"), L(""), 1},
        {L("x"), L("application/x-zstd"), L(""), 0},
        {L("x"), L("application/rdf+xml"), L(""), 1},
        {L("x"), L("application/javascript"), L(""), 1},
        {L("x"), L("application/vnd.rar"), L(""), 0},
        {L("x"), L("audio/wave"), L(""), 1},
        {L("x"), L("audio/x-pn-wav"), L(""), 1},
        {L("x"), L("audio/mpeg"), L(""), 0},
        {L("x"), L(OCTETS), L("text"), 0},
        {L("x"), L(""), L("text"), 1},
        {L("x"), L(""), L("\x01"), 0},
        {L("x"), L(""), L("%PDF-"), 0},
        {L(""), L(""), L(""), 1},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        const uint8_t *p = t_guard_put(&in_guard, cases[i].data.p, cases[i].data.n);
        CHECK_EQ(pv_should_compress(text(cases[i].name), text(cases[i].mime), p, cases[i].data.n), cases[i].want);
    }
}

/* ------------------------------------------------------------------ pairs */

static pv_header header(lit name, lit value) {
    return (pv_header){text(name), text(value)};
}

static size_t build(const pv_header *h, size_t count, char *buf, size_t cap, int want) {
    static uint32_t order[2048];
    size_t len;
    CHECK_EQ(pv_pairs_build(h, count, order, buf, cap, &len), want);
    return len;
}

static void pairs_built(void) {
    pv_header h[] = {
        header(LV("Host"), LV("x")),
        header(LV("seaweed-x"), LV("<a&b>")),
        header(LV("SEAWEED-FOO-BAR"), LV("v1")),
        header(LV("Seaweed-foo-bar"), LV("second")),
        header(LV("Seaweed-"), LV("\xff\t\"\\")),
        header(LV("Seaweed-a&b"), LV("\xe2\x80\xa8")),
        header(LV("Seaweed"), LV("no")),
        header(LV("Seaweedx-y"), LV("no")),
        header(LV("Seaweed-b c"), LV("no")),
    };
    lit want = LV(
        "{\"\":\"\\ufffd\\t\\\"\\\\\",\"A\\u0026b\":\"\\u2028\",\"Foo-Bar\":\"v1\",\"X\":\"\\u003ca\\u0026b\\u003e\"}");
    for (size_t cap = 0; cap <= want.n; cap++) {
        char *buf = (char *)out_guard.map + out_guard.room - cap;
        size_t n = build(h, PV__ARRAY_LEN(h), buf, cap, cap < want.n ? PV_EBUFFER : 1);
        if (cap == want.n) {
            check_text(__LINE__, buf, n, want);
        }
    }
    CHECK_EQ(build(h, 1, shown, sizeof shown, 0), 0);
    CHECK_EQ(build(h, 0, shown, sizeof shown, 0), 0);
    /* {"A":"..."}: 65535 bytes are kept, 65536 are not */
    static char big[65536];
    memset(big, 'v', sizeof big);
    h[0] = (pv_header){text(LV("Seaweed-A")), {big, 65535 - 8}};
    CHECK_EQ(build(h, 1, shown, sizeof shown, 1), 65535);
    h[0].value.n++;
    CHECK_EQ(build(h, 1, shown, sizeof shown, 0), 0);
    /* many, in bad order, each name three times */
    static pv_header many[1500];
    static char names[1500][16];
    uint64_t seed = 3;
    for (size_t i = 0; i < 1500; i++) {
        size_t k = i % 500;
        int n = snprintf(names[i], sizeof names[i], "%s-%04zu", i % 2 ? "SEAWEED" : "seaweed", (k * 7919) % 500);
        many[i] = (pv_header){{names[i], (size_t)n}, i < 500 ? text(LV("1")) : text(LV("2"))};
    }
    for (size_t i = 0; i < 500; i++) { /* shuffles the first 500 among themselves */
        size_t j = t_rand_below(&seed, 500);
        pv_header t = many[i];
        many[i] = many[j];
        many[j] = t;
    }
    size_t n = build(many, 1500, shown, sizeof shown, 1);
    CHECK_EQ(n, 1 + 500 * 11);
    for (size_t i = 0; i < 500; i++) {
        char one[16];
        snprintf(one, sizeof one, "\"%04zu\":\"1\"", i);
        CHECK_MEM(shown + 1 + 11 * i, one, 10);
    }
}

static void pairs_read(void) {
    static const struct {
        lit json;
        int rc;
        size_t count;
        lit name[3], value[3];
    } cases[] = {
        {L("{}"), 0, 0, {L("")}, {L("")}},
        {L(" \t\r\n{ \"a\" : \"b\" } \n"), 0, 1, {L("a")}, {L("b")}},
        {L("{\"a\":\"1\",\"a\":\"2\",\"b\":\"\"}"), 0, 3, {L("a"), L("a"), L("b")}, {L("1"), L("2"), L("")}},
        {L("{\"a\":1,\"b\":[{\"x\":[]},{}],\"c\":null}"), 0, 3, {L("a"), L("b"), L("c")}, {L(""), L(""), L("")}},
        {L("{\"\\u0041\\\"\\\\\\/\\b\\f\\n\\r\\t\":\"\\ud83d\\ude00\\u00e9\"}"),
         0,
         1,
         {L("A\"\\/\b\f\n\r\t")},
         {L("\xf0\x9f\x98\x80\xc3\xa9")}},
        {L("{\"a\":\"\\ud83d\",\"b\":\"\\ude00x\",\"c\":\"\\ud83d\\u0041\"}"),
         0,
         3,
         {L("a"), L("b"), L("c")},
         {L("\xef\xbf\xbd"), L("\xef\xbf\xbdx"),
          L("\xef\xbf\xbd"
            "A")}},
        {L("{\"a\":\"\xc0\x80\xe2\x82\xf5\"}"),
         0,
         1,
         {L("a")},
         {L("\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd")}},
        {L("{\"\xff\":\"\xc3\xa9\xed\xa0\x80\"}"),
         0,
         1,
         {L("\xef\xbf\xbd")},
         {L("\xc3\xa9\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd")}},
        {L("{\"a\":-0.5e+3,\"b\":true,\"c\":0}"), 0, 3, {L("a"), L("b"), L("c")}, {L(""), L(""), L("")}},
        {L(""), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("[]"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("\"a\""), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("null"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\"}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{a:1}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":1,}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":[1,]}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":01}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":1.}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":1e}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":-}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":nul}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":\"\n\"}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":\"\\x\"}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":\"\\u12g4\"}"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":1}{"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":[}]"), PV_EPARSE, 0, {L("")}, {L("")}},
        {L("{\"a\":\"\\"), PV_EPARSE, 0, {L("")}, {L("")}},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        for (size_t n = 0; n <= cases[i].json.n; n++) {
            pv_header h[3];
            size_t count = 9;
            pv_errinfo err;
            size_t cap = 3 * n;
            char *buf = (char *)out_guard.map + out_guard.room - cap;
            int rc = pv_pairs_parse(guarded((lit){cases[i].json.p, n}), n, buf, cap, h, 3, &count, &err);
            CHECK(rc == 0 || (rc == PV_EPARSE && err.b <= n));
            if (n < cases[i].json.n) {
                continue;
            }
            CHECK_EQ(rc, cases[i].rc);
            CHECK_EQ(count, cases[i].count);
            for (size_t k = 0; k < count; k++) {
                CHECK_TEXT(h[k].name, cases[i].name[k]);
                CHECK_TEXT(h[k].value, cases[i].value[k]);
            }
            if (rc == 0 && count > 0) {
                size_t again;
                CHECK(pv_pairs_parse(cases[i].json.p, n, buf, 0, h, 3, &again, &err) == PV_EBUFFER || count == 0);
                CHECK_EQ(pv_pairs_parse(cases[i].json.p, n, buf, cap, NULL, 0, &again, &err), 0);
                CHECK_EQ(again, count);
            }
        }
    }
    size_t out_len;
    CHECK_EQ(pv_qp_decode((const uint8_t *)"a=\rb", 4, (uint8_t *)shown, 10, &out_len), PV_EPARSE);
    /* nesting as deep as Go takes it */
    static char deep[20100];
    for (size_t depth = 9999; depth <= 10000; depth++) {
        size_t n = (size_t)snprintf(deep, sizeof deep, "{\"a\":");
        memset(deep + n, '[', depth);
        memset(deep + n + depth, ']', depth);
        n += 2 * depth;
        deep[n++] = '}';
        size_t count;
        CHECK_EQ(pv_pairs_parse(deep, n, shown, sizeof shown, NULL, 0, &count, NULL), depth == 9999 ? 0 : PV_EPARSE);
    }
}

/* ------------------------------------------------------------------ numbers, ttl, texts */

static void ttls(void) {
    static const struct {
        lit in;
        int count, unit;
    } cases[] = {
        {L(""), 0, 0},     {L("0"), 0, 0},       {L("3m"), 3, 1},     {L("3"), 3, 1},      {L("60m"), 1, 2},
        {L("24h"), 1, 3},  {L("7d"), 1, 4},      {L("30d"), 1, 5},    {L("365d"), 1, 6},   {L("4h"), 4, 2},
        {L("5d"), 5, 3},   {L("6w"), 6, 4},      {L("7M"), 7, 5},     {L("8y"), 8, 6},     {L("255m"), 255, 1},
        {L("256m"), 4, 2}, {L("300"), 5, 2},     {L("301"), 5, 2},    {L("1000h"), 41, 3}, {L("3s"), 0, 0},
        {L("m"), 0, 0},    {L("-3m"), 0, 0},     {L("+3m"), 3, 1},    {L(" 3m"), 0, 0},    {L("3 m"), 0, 0},
        {L("1e3"), 0, 0},  {L("99999y"), 0, 0},  {L("255y"), 255, 6}, {L("256y"), 0, 0},   {L("3\0"), 0, 0},
        {L("5D"), 0, 0},   {L("6143h"), 255, 3},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        uint8_t count = 9;
        uint8_t unit = 9;
        CHECK_EQ(pv_ttl_parse(guarded(cases[i].in), cases[i].in.n, &count, &unit), cases[i].unit != 0);
        CHECK_EQ(count, cases[i].count);
        CHECK_EQ(unit, cases[i].unit);
    }
}

static void numbers(void) {
    CHECK_EQ(pv_ts_parse("1700000000", 10), 1700000000);
    CHECK_EQ(pv_ts_parse("18446744073709551615", 20), UINT64_MAX);
    CHECK_EQ(pv_ts_parse("18446744073709551616", 20), UINT64_MAX);
    CHECK_EQ(pv_ts_parse("-5", 2), 0);
    CHECK_EQ(pv_ts_parse("+5", 2), 0);
    CHECK_EQ(pv_ts_parse("", 0), 0);
    static const struct {
        lit in;
        int rc;
        int64_t v;
    } ints[] = {
        {L("5"), 0, 5},
        {L("+5"), 0, 5},
        {L("-5"), 0, -5},
        {L("9223372036854775807"), 0, INT64_MAX},
        {L("9223372036854775808"), PV_ERANGE, INT64_MAX},
        {L("-9223372036854775808"), 0, INT64_MIN},
        {L("-9223372036854775809"), PV_ERANGE, INT64_MIN},
        {L("99999999999999999999"), PV_ERANGE, INT64_MAX},
        {L(""), PV_EPARSE, 0},
        {L("-"), PV_EPARSE, 0},
        {L("+-5"), PV_EPARSE, 0},
        {L(" 5"), PV_EPARSE, 0},
        {L("0x5"), PV_EPARSE, 0},
        {L("1_0"), PV_EPARSE, 0},
    };
    for (size_t i = 0; i < PV__ARRAY_LEN(ints); i++) {
        int64_t v = 9;
        CHECK_EQ(pv_int_parse(guarded(ints[i].in), ints[i].in.n, &v), ints[i].rc);
        CHECK_EQ(v, ints[i].v);
    }
    static const char *const yes[] = {"1", "t", "T", "true", "TRUE", "True"};
    static const char *const no[] = {"0", "f", "F", "false", "FALSE", "False"};
    static const char *const neither[] = {"", "tRue", "yes", "2", "true "};
    for (size_t i = 0; i < 6; i++) {
        CHECK_EQ(pv_bool_parse(yes[i], strlen(yes[i])), 1);
        CHECK_EQ(pv_bool_parse(no[i], strlen(no[i])), 0);
    }
    for (size_t i = 0; i < PV__ARRAY_LEN(neither); i++) {
        CHECK_EQ(pv_bool_parse(neither[i], strlen(neither[i])), PV_EPARSE);
    }
}

static void texts(void) {
    pv_text none = {NULL, 0};
    CHECK_RENDER(LV("\"a\\u003c\\u003e\\u0026\\\"\\\\\\b\\f\\n\\r\\t\\u0000\\u001f\x7f\xc3\xa9\\u2028\\u2029\\ufffd\""),
                 pv_json_escape("a<>&\"\\\b\f\n\r\t\0\x1f\x7f\xc3\xa9\xe2\x80\xa8\xe2\x80\xa9\xff", 23, buf, cap));
    CHECK_RENDER(LV("\"\""), pv_json_escape(NULL, 0, buf, cap));
    CHECK_RENDER(LV("\"\\a\\b\\f\\n\\r\\t\\v\\\\\\\"\\x00\\x7f\xc3\xa9\\xff\\u00ad\\U000e0001\""),
                 pv_go_quote("\a\b\f\n\r\t\v\\\"\0\x7f\xc3\xa9\xff\xc2\xad\xf3\xa0\x80\x81", 20, buf, cap));
    CHECK_RENDER(LV("X-Amz-Request-Id"), pv_header_canonical("x-amz-REQUEST-iD", 16, buf, cap));
    CHECK_RENDER(LV("foo Bar"), pv_header_canonical("foo Bar", 7, buf, cap));
    CHECK_RENDER(LV("_a-B1-!"), pv_header_canonical("_A-b1-!", 7, buf, cap));
    CHECK_RENDER(LV("18EB1CEF467CDB30ECD8D0E4"), pv_request_id(0x18EB1CEF467CDB30, 0xECD8D0E4, buf, cap));
    CHECK_RENDER(LV("18EB1CEF467CDB300000000F"), pv_request_id(0x18EB1CEF467CDB30, 15, buf, cap));
    CHECK_RENDER(LV("{\"name\":\"h.txt\",\"size\":11,\"eTag\":\"c99465aa\",\"mime\":\"text/plain\"}"),
                 pv_write_reply(text(LV("h.txt")), 11, 0xc99465aa, text(LV("text/plain")), none, buf, cap));
    CHECK_RENDER(LV("{\"size\":3,\"eTag\":\"364b3fb7\"}"), pv_write_reply(none, 3, 0x364b3fb7, none, none, buf, cap));
    CHECK_RENDER(LV("{\"eTag\":\"00000000\",\"mime\":\"a\\u0026\",\"contentMd5\":\"m==\"}"),
                 pv_write_reply(none, 0, 0, text(LV("a&")), text(LV("m==")), buf, cap));
    CHECK_RENDER(LV("{\"name\":\"\\ufffd\",\"eTag\":\"0000000a\"}"),
                 pv_write_reply(text(LV("\xff")), 0, 10, none, none, buf, cap));
}

/* ------------------------------------------------------------------ without memory */

static void mime_without_memory(void) {
    for (long k = 1;; k++) { /* each allocation fails once */
        CHECK_EQ(pv__alloc_fail_at(k), 0);
        pv_mime *m;
        int rc = pv_mime_new(&m);
        if (rc == 0) {
            rc = pv_mime_add(m, ".x", 2, "text/x", 6, 0);
            if (rc >= 0) {
                rc = pv_mime_seal(m);
            }
        }
        pv_mime_free(m);
        if (pv__alloc_fail_at(0) > 0) {
            CHECK_EQ(rc, 0);
            CHECK(k > 100);
            break;
        }
        CHECK_EQ(rc, PV_ENOMEM);
    }
}

int main(void) {
    in_guard = t_guard_new(GUARD_ROOM);
    out_guard = t_guard_new(ROOM);
    CHECK_EQ(pv_mime_new(&table), 0);
    CHECK_EQ(pv_mime_seal(table), 0);
    RUN(urls);
    RUN(write_fids);
    RUN(vids);
    RUN(fids);
    RUN(ranges);
    RUN(http_dates);
    RUN(conditions);
    RUN(dispositions);
    RUN(sniffing);
    RUN(extensions);
    RUN(plain_answers);
    RUN(range_answers);
    RUN(compressed_answers);
    RUN(streamed_answers);
    RUN(override_answers);
    RUN(pair_answers);
    RUN(form_checks);
    RUN(raw_uploads);
    RUN(multipart_uploads);
    RUN(upload_limits);
    RUN(compression);
    RUN(pairs_built);
    RUN(pairs_read);
    RUN(ttls);
    RUN(numbers);
    RUN(texts);
    RUN(mime_without_memory);
    pv_mime_free(table);
    t_guard_free(&in_guard);
    t_guard_free(&out_guard);
    return T_END();
}
