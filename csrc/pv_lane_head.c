/* pv_lane_head.c - recognises the request heads that the fast lane serves, and no others.
 *
 * A narrow subset on purpose: HTTP/1.1, a known method, an origin-form target of plain characters whose first is a digit
 * (so that it is none of the fixed routes), CR LF line ends, token names from a list, no folding, nothing repeated that
 * matters, one Host, no Transfer-Encoding, no Expect, no Upgrade. What is not recognised is not judged: it goes to the
 * other lane as it came.
 */
#include "pv_lane_int.h"

enum class { C_PATH = 1, C_QUERY = 2, C_HOST = 4, C_VALUE = 8, C_DIGIT = 16 };

#define C_ANY (C_PATH | C_QUERY | C_HOST | C_VALUE)
/* Everything not listed has no class; '\t' is allowed in values. */
static const uint8_t classes[256] = {
    ['\t'] = C_VALUE,
    [' ' ... '%'] = C_VALUE,
    ['&'] = C_QUERY | C_VALUE,
    ['\'' ... '+'] = C_VALUE,
    [','] = C_PATH | C_VALUE,
    ['-' ... '.'] = C_ANY,
    ['/'] = C_PATH | C_VALUE,
    ['0' ... '9'] = C_ANY | C_DIGIT,
    [':'] = C_HOST | C_VALUE,
    [';' ... '<'] = C_VALUE,
    ['='] = C_PATH | C_QUERY | C_VALUE,
    ['>' ... '?'] = C_VALUE,
    ['@'] = C_PATH | C_VALUE,
    ['A' ... 'Z'] = C_ANY,
    ['['] = C_HOST | C_VALUE,
    ['\\'] = C_VALUE,
    [']'] = C_HOST | C_VALUE,
    ['^'] = C_VALUE,
    ['_'] = C_ANY,
    ['`'] = C_VALUE,
    ['a' ... 'z'] = C_ANY,
    ['{' ... '}'] = C_VALUE,
    ['~'] = C_PATH | C_VALUE,
};

static uint8_t class_of(unsigned char c) {
    return classes[c];
}

static bool all_of(const char *p, size_t n, uint8_t class) {
    for (size_t i = 0; i < n; i++) {
        if ((class_of((unsigned char)p[i]) & class) == 0) {
            return false;
        }
    }
    return true;
}

static char lower(char c) {
    return c >= 'A' && c <= 'Z' ? (char)(c + 32) : c;
}

/* name is in lower case. */
static bool same_name(const char *p, size_t n, const char *name, size_t len) {
    if (n != len) {
        return false;
    }
    for (size_t i = 0; i < n; i++) {
        if (lower(p[i]) != name[i]) {
            return false;
        }
    }
    return true;
}

#define IS(p, n, text) same_name((p), (n), (text), sizeof(text) - 1)

typedef struct known {
    const char *name;
    uint8_t len;
    uint8_t field;
} known;

#define KNOWN(text, field) {text, sizeof(text) - 1, field}
/* The usual ones first. The other lane does not look at those that are ignored (tokens: only with a signing key, and then
 * such requests are not served here). */
static const known names[] = {
    KNOWN("host", PV__F_HOST),
    KNOWN("user-agent", PV__F_IGNORED),
    KNOWN("content-length", PV__F_CONTENT_LENGTH),
    KNOWN("accept-encoding", PV__F_ACCEPT_ENCODING),
    KNOWN("content-type", PV__F_CONTENT_TYPE),
    KNOWN("accept", PV__F_IGNORED),
    KNOWN("connection", PV__F_CONNECTION),
    KNOWN("range", PV__F_RANGE),
    KNOWN("if-none-match", PV__F_IF_NONE_MATCH),
    KNOWN("if-modified-since", PV__F_IF_MODIFIED_SINCE),
    KNOWN("content-disposition", PV__F_CONTENT_DISPOSITION),
    KNOWN("content-encoding", PV__F_CONTENT_ENCODING),
    KNOWN("origin", PV__F_ORIGIN),
    KNOWN("authorization", PV__F_CREDENTIALS),
    KNOWN("cookie", PV__F_CREDENTIALS),
    KNOWN("referer", PV__F_IGNORED),
    KNOWN("accept-language", PV__F_IGNORED),
    KNOWN("cache-control", PV__F_IGNORED),
    KNOWN("pragma", PV__F_IGNORED),
    KNOWN("dnt", PV__F_IGNORED),
    KNOWN("forwarded", PV__F_IGNORED),
    KNOWN("from", PV__F_IGNORED),
    KNOWN("priority", PV__F_IGNORED),
    KNOWN("sec-fetch-dest", PV__F_IGNORED),
    KNOWN("sec-fetch-mode", PV__F_IGNORED),
    KNOWN("sec-fetch-site", PV__F_IGNORED),
    KNOWN("sec-fetch-user", PV__F_IGNORED),
    KNOWN("traceparent", PV__F_IGNORED),
    KNOWN("tracestate", PV__F_IGNORED),
    KNOWN("upgrade-insecure-requests", PV__F_IGNORED),
    KNOWN("x-amz-request-id", PV__F_IGNORED),
    KNOWN("x-forwarded-for", PV__F_IGNORED),
    KNOWN("x-forwarded-host", PV__F_IGNORED),
    KNOWN("x-forwarded-proto", PV__F_IGNORED),
    KNOWN("x-real-ip", PV__F_IGNORED),
    KNOWN("x-request-id", PV__F_IGNORED),
};

/* The field of a name, or -1. */
static int field_of(const char *p, size_t n) {
    for (size_t i = 0; i < PV__ARRAY_LEN(names); i++) {
        if (names[i].len == n && lower(p[0]) == names[i].name[0] && same_name(p, n, names[i].name, n)) {
            return names[i].field;
        }
    }
    return -1;
}

static bool request_line(pv__head *h, const char *buf, uint32_t end) {
    static const struct {
        const char *text;
        uint8_t len;
        uint8_t method;
    } methods[] = {{"GET ", 4, PV__M_GET},
                   {"POST ", 5, PV__M_POST},
                   {"PUT ", 4, PV__M_PUT},
                   {"HEAD ", 5, PV__M_HEAD},
                   {"DELETE ", 7, PV__M_DELETE}};
    static const char version[] = " HTTP/1.1";
    uint32_t at = 0;
    uint8_t method = PV__M_NONE;
    for (size_t i = 0; i < PV__ARRAY_LEN(methods) && method == PV__M_NONE; i++) {
        if (end >= methods[i].len && memcmp(buf, methods[i].text, methods[i].len) == 0) {
            method = methods[i].method;
            at = methods[i].len;
        }
    }
    uint32_t tail = sizeof version - 1;
    if (method == PV__M_NONE || end < at + 2 + tail || memcmp(buf + end - tail, version, tail) != 0) {
        return false;
    }
    uint32_t stop = end - tail;
    const char *question = memchr(buf + at, '?', stop - at);
    uint32_t path_end = question != NULL ? (uint32_t)(question - buf) : stop;
    if (path_end < at + 2 || buf[at] != '/' || (class_of((unsigned char)buf[at + 1]) & C_DIGIT) == 0 ||
        !all_of(buf + at, path_end - at, C_PATH)) {
        return false;
    }
    h->path = (pv__span){at, path_end - at};
    if (question != NULL) {
        h->query = (pv__span){path_end + 1, stop - path_end - 1};
        if (!all_of(buf + path_end + 1, stop - path_end - 1, C_QUERY)) {
            return false;
        }
    }
    h->method = method;
    return true;
}

static bool length_value(pv__head *h, const char *p, size_t n) {
    if (n == 0 || n > 18 || !all_of(p, n, C_DIGIT)) {
        return false;
    }
    uint64_t v = 0;
    for (size_t i = 0; i < n; i++) {
        v = v * 10 + (uint64_t)(p[i] - '0');
    }
    h->content_length = v;
    return true;
}

static bool header_line(pv__head *h, const char *buf, uint32_t at, uint32_t end) {
    const char *colon = memchr(buf + at, ':', end - at);
    if (colon == NULL || colon == buf + at || ++h->lines > PV__HEAD_LINES) {
        return false;
    }
    int field = field_of(buf + at, (size_t)(colon - buf) - at);
    if (field < 0) {
        return false;
    }
    uint32_t from = (uint32_t)(colon - buf) + 1;
    while (from < end && (buf[from] == ' ' || buf[from] == '\t')) {
        from++;
    }
    uint32_t to = end;
    while (to > from && (buf[to - 1] == ' ' || buf[to - 1] == '\t')) {
        to--;
    }
    const char *p = buf + from;
    size_t n = to - from;
    if (!all_of(p, n, C_VALUE)) {
        return false;
    }
    if (field == PV__F_IGNORED || field == PV__F_CREDENTIALS) {
        h->credentials = h->credentials || field == PV__F_CREDENTIALS;
        return true;
    }
    uint32_t bit = UINT32_C(1) << field;
    if ((h->seen & bit) != 0) {
        return false;
    }
    h->seen |= bit;
    h->fields[field] = (pv__span){from, (uint32_t)n};
    switch (field) {
    case PV__F_HOST:
        return n != 0 && all_of(p, n, C_HOST);
    case PV__F_CONNECTION:
        h->close = IS(p, n, "close");
        return h->close || IS(p, n, "keep-alive");
    case PV__F_CONTENT_LENGTH:
        return length_value(h, p, n);
    default:
        return true;
    }
}

int pv__head_feed(pv__head *h, const char *buf, size_t len) {
    if (len > 0 && h->pos == 0 && (buf[0] < 'D' || buf[0] > 'P')) {
        return PV_EPARSE; /* no method of ours: do not wait for the line's end */
    }
    size_t stop = len < PV__HEAD_MAX ? len : PV__HEAD_MAX;
    while (h->scan < stop) {
        const char *hit = memchr(buf + h->scan, '\n', stop - h->scan);
        if (hit == NULL) {
            h->scan = (uint32_t)stop;
            break;
        }
        uint32_t at = h->pos;
        uint32_t end = (uint32_t)(hit - buf);
        h->pos = h->scan = end + 1;
        if (end == at || buf[end - 1] != '\r') {
            return PV_EPARSE;
        }
        end--;
        if (h->method == PV__M_NONE) {
            if (!request_line(h, buf, end)) {
                return PV_EPARSE;
            }
        } else if (end == at) {
            return (h->seen & (UINT32_C(1) << PV__F_HOST)) != 0 ? (int)h->pos : PV_EPARSE;
        } else if (!header_line(h, buf, at, end)) {
            return PV_EPARSE;
        }
    }
    return len >= PV__HEAD_MAX ? PV_EPARSE : PV_EMORE;
}
