/* pv_http_text.c - texts of the HTTP part: writing and quoting, UTF-8, numbers, JSON objects, media types by parameter,
 * by content and by extension. No I/O; only pv_mime allocates.
 */
#include "pv_http_int.h"
#include "pv_http_tab.h"

const char pv__hex_lower[16] = {'0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'};
const char pv__hex_upper[16] = {'0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'A', 'B', 'C', 'D', 'E', 'F'};

#define RUNE_MAX 0x10ffff

/* ------------------------------------------------------------------ numbers out */

void pv__put_u64(struct pv__wr *w, uint64_t v) {
    char d[20];
    size_t i = sizeof d;
    do {
        d[--i] = (char)('0' + v % 10);
        v /= 10;
    } while (v != 0);
    pv__put(w, d + i, sizeof d - i);
}

void pv__put_i64(struct pv__wr *w, int64_t v) {
    if (v < 0) {
        pv__put_char(w, '-');
    }
    pv__put_u64(w, v < 0 ? 0 - (uint64_t)v : (uint64_t)v);
}

void pv__put_hex(struct pv__wr *w, uint64_t v, unsigned min_digits, const char *digits16) {
    char d[16];
    size_t i = sizeof d;
    do {
        d[--i] = digits16[v & 15];
        v >>= 4;
    } while (v != 0 || (sizeof d - i < min_digits && i > 0));
    pv__put(w, d + i, sizeof d - i);
}

/* ------------------------------------------------------------------ numbers in */

enum pv__num pv__uint(pv_text t, unsigned base, uint64_t *v) {
    *v = 0;
    if (t.n == 0) {
        return PV__NUM_SYNTAX;
    }
    uint64_t sum = 0;
    for (size_t i = 0; i < t.n; i++) {
        int d = pv__hex((unsigned char)t.p[i]);
        if (d < 0 || (unsigned)d >= base) {
            return PV__NUM_SYNTAX;
        }
        uint64_t next;
        if (__builtin_mul_overflow(sum, (uint64_t)base, &next) || __builtin_add_overflow(next, (uint64_t)d, &next)) {
            *v = UINT64_MAX; /* what follows is not looked at, as in Go */
            return PV__NUM_RANGE;
        }
        sum = next;
    }
    *v = sum;
    return PV__NUM_OK;
}

enum pv__num pv__int(pv_text t, int64_t *v) {
    *v = 0;
    int negative = t.n != 0 && t.p[0] == '-';
    if (negative || (t.n != 0 && t.p[0] == '+')) {
        t.p++;
        t.n--;
    }
    uint64_t u;
    if (pv__uint(t, 10, &u) == PV__NUM_SYNTAX) {
        return PV__NUM_SYNTAX;
    }
    if (negative) {
        if (u > (uint64_t)INT64_MAX + 1) {
            *v = INT64_MIN;
            return PV__NUM_RANGE;
        }
        *v = u == (uint64_t)INT64_MAX + 1 ? INT64_MIN : -(int64_t)u;
        return PV__NUM_OK;
    }
    if (u > INT64_MAX) {
        *v = INT64_MAX;
        return PV__NUM_RANGE;
    }
    *v = (int64_t)u;
    return PV__NUM_OK;
}

uint64_t pv_ts_parse(const char *p, size_t n) {
    uint64_t v;
    (void)pv__uint(pv__text(p, n), 10, &v);
    return v;
}

int pv_int_parse(const char *p, size_t n, int64_t *v) {
    enum pv__num rc = pv__int(pv__text(p, n), v);
    return rc == PV__NUM_OK ? 0 : rc == PV__NUM_RANGE ? PV_ERANGE : PV_EPARSE;
}

int pv_bool_parse(const char *p, size_t n) {
    static const char *const words[2][6] = {{"0", "f", "F", "false", "FALSE", "False"},
                                            {"1", "t", "T", "true", "TRUE", "True"}};
    for (int v = 0; v < 2; v++) {
        for (size_t i = 0; i < PV__ARRAY_LEN(words[v]); i++) {
            if (pv__same(p, n, pv__cstr(words[v][i]))) {
                return v;
            }
        }
    }
    return PV_EPARSE;
}

/* ------------------------------------------------------------------ UTF-8 */

size_t pv__rune(const char *s, size_t n, uint32_t *cp) {
    const unsigned char *p = (const unsigned char *)s;
    unsigned c = p[0];
    if (c < 0x80) {
        *cp = c;
        return 1;
    }
    size_t len = c < 0xc2 ? 0 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
    if (len == 0 || n < len) {
        return 0;
    }
    uint32_t v = c & (0x7fU >> len);
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
        v = v << 6 | (p[i] & 0x3fU);
    }
    if ((len == 3 && (v < 0x800 || (v >= 0xd800 && v < 0xe000))) || (len == 4 && (v < 0x10000 || v > RUNE_MAX))) {
        return 0;
    }
    *cp = v;
    return len;
}

static size_t put_rune(unsigned char *q, uint32_t v) {
    if (v < 0x80) {
        q[0] = (unsigned char)v;
        return 1;
    }
    if (v < 0x800) {
        q[0] = (unsigned char)(0xc0 | v >> 6);
        q[1] = (unsigned char)(0x80 | (v & 0x3f));
        return 2;
    }
    if (v < 0x10000) {
        q[0] = (unsigned char)(0xe0 | v >> 12);
        q[1] = (unsigned char)(0x80 | (v >> 6 & 0x3f));
        q[2] = (unsigned char)(0x80 | (v & 0x3f));
        return 3;
    }
    q[0] = (unsigned char)(0xf0 | v >> 18);
    q[1] = (unsigned char)(0x80 | (v >> 12 & 0x3f));
    q[2] = (unsigned char)(0x80 | (v >> 6 & 0x3f));
    q[3] = (unsigned char)(0x80 | (v & 0x3f));
    return 4;
}

static int is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

pv_text pv__trim_left(pv_text t) {
    uint32_t c;
    size_t len;
    while (t.n != 0 && (len = pv__rune(t.p, t.n, &c)) != 0 && is_space(c)) {
        t.p += len;
        t.n -= len;
    }
    return t;
}

pv_text pv__trim(pv_text t) {
    t = pv__trim_left(t);
    while (t.n != 0) {
        size_t len = 1; /* of the last sequence */
        while (len < 3 && len < t.n && ((unsigned char)t.p[t.n - len] & 0xc0) == 0x80) {
            len++;
        }
        uint32_t c;
        if (pv__rune(t.p + t.n - len, len, &c) != len || !is_space(c)) {
            break;
        }
        t.n -= len;
    }
    return t;
}

int pv__eq_nocase(pv_text a, pv_text b) {
    if (a.n != b.n) {
        return 0;
    }
    for (size_t i = 0; i < a.n; i++) {
        if (pv__lower((unsigned char)a.p[i]) != pv__lower((unsigned char)b.p[i])) {
            return 0;
        }
    }
    return 1;
}

/* ------------------------------------------------------------------ quoting */

static int is_print(uint32_t c) {
    if (c < 0x80) {
        return c >= 0x20 && c < 0x7f;
    }
    int wide = c > 0xffff;
    size_t low = 0;
    size_t high = wide ? PV__ARRAY_LEN(pv__print32) : PV__ARRAY_LEN(pv__print16);
    while (low < high) {
        size_t mid = low + (high - low) / 2;
        uint32_t first = wide ? pv__print32[mid][0] : pv__print16[mid][0];
        uint32_t last = wide ? pv__print32[mid][1] : pv__print16[mid][1];
        if (c < first) {
            high = mid;
        } else if (c > last) {
            low = mid + 1;
        } else {
            return 1;
        }
    }
    return 0;
}

void pv__put_quote(struct pv__wr *w, pv_text t) {
    static const char letters[] = "abtnvfr"; /* of 0x07 to 0x0d */
    pv__put_char(w, '"');
    for (size_t i = 0; i < t.n;) {
        uint32_t c = 0;
        size_t len = pv__rune(t.p + i, t.n - i, &c);
        if (len == 0) {
            PV__PUT(w, "\\x");
            pv__put_hex(w, (unsigned char)t.p[i], 2, pv__hex_lower);
            i++;
            continue;
        }
        if (c == '"' || c == '\\') {
            pv__put_char(w, '\\');
            pv__put_char(w, (char)c);
        } else if (is_print(c)) {
            pv__put(w, t.p + i, len);
        } else if (c >= 7 && c <= 13) {
            pv__put_char(w, '\\');
            pv__put_char(w, letters[c - 7]);
        } else if (c < 0x20 || c == 0x7f) {
            PV__PUT(w, "\\x");
            pv__put_hex(w, c, 2, pv__hex_lower);
        } else if (c < 0x10000) {
            PV__PUT(w, "\\u");
            pv__put_hex(w, c, 4, pv__hex_lower);
        } else {
            PV__PUT(w, "\\U");
            pv__put_hex(w, c, 8, pv__hex_lower);
        }
        i += len;
    }
    pv__put_char(w, '"');
}

void pv__put_json(struct pv__wr *w, pv_text t) {
    pv__put_char(w, '"');
    size_t plain = 0; /* where the run of bytes that stand for themselves began */
    for (size_t i = 0; i < t.n;) {
        unsigned char b = (unsigned char)t.p[i];
        uint32_t c = 0;
        size_t len = pv__rune(t.p + i, t.n - i, &c);
        if (b >= 0x20 && b < 0x80 && b != '"' && b != '\\' && b != '<' && b != '>' && b != '&') {
            i++;
            continue;
        }
        if (b >= 0x80 && len != 0 && c != 0x2028 && c != 0x2029) {
            i += len;
            continue;
        }
        pv__put_text(w, pv__slice(t, plain, i));
        if (len == 0) {
            PV__PUT(w, "\\ufffd");
            len = 1;
        } else if (b == '"' || b == '\\') {
            pv__put_char(w, '\\');
            pv__put_char(w, (char)b);
        } else if (b == '\n' || b == '\r' || b == '\t' || b == '\b' || b == '\f') {
            pv__put_char(w, '\\');
            pv__put_char(w, b == '\n' ? 'n' : b == '\r' ? 'r' : b == '\t' ? 't' : b == '\b' ? 'b' : 'f');
        } else {
            PV__PUT(w, "\\u");
            pv__put_hex(w, c, 4, pv__hex_lower);
        }
        i += len;
        plain = i;
    }
    pv__put_text(w, pv__slice(t, plain, t.n));
    pv__put_char(w, '"');
}

size_t pv_json_escape(const char *p, size_t n, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    pv__put_json(&w, pv__text(p, n));
    return w.n;
}

size_t pv_go_quote(const char *p, size_t n, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    pv__put_quote(&w, pv__text(p, n));
    return w.n;
}

size_t pv_header_canonical(const char *p, size_t n, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    int token = 1;
    for (size_t i = 0; i < n; i++) {
        token &= pv__is_field((unsigned char)p[i]);
    }
    int first = 1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)p[i];
        pv__put_char(&w, (char)(!token ? c : first ? pv__upper(c) : pv__lower(c)));
        first = c == '-';
    }
    return w.n;
}

size_t pv_request_id(uint64_t ns, uint32_t random32, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    pv__put_hex(&w, ns, 1, pv__hex_upper);
    pv__put_hex(&w, random32, 8, pv__hex_upper);
    return w.n;
}

/* ------------------------------------------------------------------ JSON objects */

#define JSON_DEPTH 10000 /* Go's bound on nesting */

static size_t json_blank(pv_text j, size_t at) {
    while (at < j.n && (j.p[at] == ' ' || j.p[at] == '\t' || j.p[at] == '\r' || j.p[at] == '\n')) {
        at++;
    }
    return at;
}

/* Position behind a string that begins (with its quote) at at, or 0 with *bad where it goes wrong. */
static size_t json_string(pv_text j, size_t at, size_t *bad) {
    for (at++; at < j.n; at++) {
        unsigned char c = (unsigned char)j.p[at];
        if (c == '"') {
            return at + 1;
        }
        if (c < 0x20) {
            break;
        }
        if (c != '\\') {
            continue;
        }
        at++;
        if (at == j.n) {
            break;
        }
        if (j.p[at] == 'u') {
            for (int i = 0; i < 4; i++) {
                at++;
                if (at == j.n || pv__hex((unsigned char)j.p[at]) < 0) {
                    *bad = at;
                    return 0;
                }
            }
        } else if (j.p[at] == '\0' || strchr("\"\\/bfnrt", j.p[at]) == NULL) {
            break;
        }
    }
    *bad = at;
    return 0;
}

/* Position behind a number, true, false or null at at, or 0 with *bad. */
static size_t json_atom(pv_text j, size_t at, size_t *bad) {
    static const char *const words[] = {"true", "false", "null"};
    for (size_t i = 0; i < PV__ARRAY_LEN(words); i++) {
        pv_text word = pv__cstr(words[i]);
        if (pv__starts(pv__text(j.p + at, j.n - at), word)) {
            return at + word.n;
        }
    }
    size_t start = at;
    if (at < j.n && j.p[at] == '-') {
        at++;
    }
    if (at < j.n && j.p[at] == '0') {
        at++;
    } else {
        size_t first = at;
        while (at < j.n && pv__is_digit((unsigned char)j.p[at])) {
            at++;
        }
        if (at == first) {
            *bad = start;
            return 0;
        }
    }
    if (at < j.n && j.p[at] == '.') {
        size_t first = ++at;
        while (at < j.n && pv__is_digit((unsigned char)j.p[at])) {
            at++;
        }
        if (at == first) {
            *bad = at;
            return 0;
        }
    }
    if (at < j.n && (j.p[at] == 'e' || j.p[at] == 'E')) {
        at++;
        if (at < j.n && (j.p[at] == '+' || j.p[at] == '-')) {
            at++;
        }
        size_t first = at;
        while (at < j.n && pv__is_digit((unsigned char)j.p[at])) {
            at++;
        }
        if (at == first) {
            *bad = at;
            return 0;
        }
    }
    return at;
}

/* Position behind the value at at (blanks before it allowed), or 0 with *bad. No recursion: one bit per level
 * says whether it is an object. */
static size_t json_value(pv_text j, size_t at, size_t *bad) {
    uint8_t is_object[(JSON_DEPTH + 7) / 8];
    size_t depth = 0;
    enum { VALUE, VALUE_OR_END, KEY, KEY_OR_END, AFTER } want = VALUE;
    for (;;) {
        at = json_blank(j, at);
        if (want == AFTER && depth == 0) {
            return at;
        }
        if (at == j.n) {
            *bad = at;
            return 0;
        }
        char c = j.p[at];
        int object = depth != 0 && (is_object[(depth - 1) / 8] >> (depth - 1) % 8 & 1) != 0;
        if ((want == AFTER || want == VALUE_OR_END || want == KEY_OR_END) && c == (object ? '}' : ']')) {
            depth--;
            at++;
            want = AFTER;
        } else if (want == AFTER) {
            if (c != ',') {
                *bad = at;
                return 0;
            }
            at++;
            want = object ? KEY : VALUE;
        } else if (want == KEY || want == KEY_OR_END) {
            if (c != '"') {
                *bad = at;
                return 0;
            }
            size_t end = json_string(j, at, bad);
            if (end == 0) {
                return 0;
            }
            at = json_blank(j, end);
            if (at == j.n || j.p[at] != ':') {
                *bad = at;
                return 0;
            }
            at++;
            want = VALUE;
        } else if (c == '{' || c == '[') {
            if (depth == JSON_DEPTH) {
                *bad = at;
                return 0;
            }
            uint8_t bit = (uint8_t)(1U << depth % 8);
            is_object[depth / 8] = (uint8_t)((depth % 8 == 0 ? 0 : is_object[depth / 8] & ~bit) | (c == '{' ? bit : 0));
            depth++;
            at++;
            want = c == '{' ? KEY_OR_END : VALUE_OR_END;
        } else {
            size_t end = c == '"' ? json_string(j, at, bad) : json_atom(j, at, bad);
            if (end == 0) {
                return 0;
            }
            at = end;
            want = AFTER;
        }
    }
}

int pv__json_object(pv_text json, size_t *at) {
    size_t start = json_blank(json, 0);
    size_t bad = 0;
    size_t end = json_value(json, 0, &bad);
    if (end == 0) {
        *at = bad;
        return PV_EPARSE;
    }
    if (end != json.n) {
        *at = end;
        return PV_EPARSE;
    }
    *at = start;
    return json.p[start] == '{' ? 0 : PV_EPARSE;
}

int pv__json_member(pv_text json, size_t *at, pv_text *name, pv_text *value) {
    size_t bad = 0;
    /* at the object's brace, or at the comma or brace behind a member */
    size_t i = json_blank(json, *at == 0 ? json_blank(json, 0) + 1 : *at);
    if (json.p[i] == '}') {
        return 0;
    }
    if (json.p[i] == ',') {
        i = json_blank(json, i + 1);
    }
    size_t end = json_string(json, i, &bad);
    *name = pv__text(json.p + i + 1, end - i - 2);
    i = json_blank(json, json_blank(json, end) + 1); /* behind the colon */
    if (json.p[i] == '"') {
        end = json_string(json, i, &bad);
        *value = pv__text(json.p + i + 1, end - i - 2);
    } else {
        end = json_value(json, i, &bad);
        *value = pv__text(NULL, 0);
    }
    *at = json_blank(json, end);
    return 1;
}

static uint32_t hex4(const char *p) {
    uint32_t v = 0;
    for (int i = 0; i < 4; i++) {
        v = v << 4 | (uint32_t)pv__hex((unsigned char)p[i]);
    }
    return v;
}

/* Queues a code point's bytes in reverse, so that the next one to go is the last of the queue. */
static void chars_queue(struct pv__chars *c, uint32_t cp) {
    unsigned char q[4];
    size_t len = put_rune(q, cp);
    for (size_t i = 0; i < len; i++) {
        c->queue[i] = q[len - 1 - i];
    }
    c->pending = (unsigned)len;
}

int pv__chars_next(struct pv__chars *c) {
    if (c->pending != 0) {
        return c->queue[--c->pending];
    }
    if (c->p == c->end) {
        return -1;
    }
    if (!c->json) {
        return (unsigned char)*c->p++;
    }
    uint32_t cp = 0xfffd;
    if (*c->p != '\\') {
        size_t len = pv__rune(c->p, (size_t)(c->end - c->p), &cp);
        c->p += len != 0 ? len : 1;
    } else if (c->p[1] != 'u') {
        static const char from[] = "bfnrt";
        static const char to[] = "\b\f\n\r\t";
        const char *hit = strchr(from, c->p[1]);
        cp = (unsigned char)(hit != NULL ? to[hit - from] : c->p[1]);
        c->p += 2;
    } else {
        cp = hex4(c->p + 2);
        c->p += 6;
        if (cp >= 0xd800 && cp < 0xe000) {
            uint32_t low = c->end - c->p >= 6 && c->p[0] == '\\' && c->p[1] == 'u' ? hex4(c->p + 2) : 0;
            if (cp < 0xdc00 && low >= 0xdc00 && low < 0xe000) {
                cp = 0x10000 + ((cp - 0xd800) << 10) + (low - 0xdc00);
                c->p += 6;
            } else {
                cp = 0xfffd;
            }
        }
    }
    chars_queue(c, cp);
    return c->queue[--c->pending];
}

/* ------------------------------------------------------------------ media types with parameters */

/* Length of the token character at p in a type that Go lower-cases first: two letters beyond ASCII become ASCII ones
 * (U+212A KELVIN SIGN, U+0130). 0: no token character. *lower: the letter in lower case. */
static size_t type_char(const char *p, size_t n, unsigned char *lower) {
    if (n >= 3 && memcmp(p, "\xe2\x84\xaa", 3) == 0) {
        *lower = 'k';
        return 3;
    }
    if (n >= 2 && memcmp(p, "\xc4\xb0", 2) == 0) {
        *lower = 'i';
        return 2;
    }
    *lower = pv__lower((unsigned char)p[0]);
    return pv__is_token((unsigned char)p[0]) ? 1 : 0;
}

static size_t type_token(pv_text t) {
    size_t i = 0;
    unsigned char c;
    size_t len;
    while (i < t.n && (len = type_char(t.p + i, t.n - i, &c)) != 0) {
        i += len;
    }
    return i;
}

int pv__mt_is(const struct pv__mt *mt, pv_text type) {
    pv_text t = mt->type;
    size_t i = 0;
    for (size_t k = 0; k < type.n; k++) {
        unsigned char c;
        if (i == t.n) {
            return 0;
        }
        size_t len = type_char(t.p + i, t.n - i, &c);
        if (c != (unsigned char)type.p[k]) {
            return 0;
        }
        i += len != 0 ? len : 1; /* the slash is no token character */
    }
    return i == t.n;
}

/* Length of a value at the head of t, raw; its text without quotes. 0: none there. */
static size_t mt_value(pv_text t, pv_text *value, int *quoted) {
    size_t i = 0;
    if (t.n == 0 || t.p[0] != '"') {
        while (i < t.n && pv__is_token((unsigned char)t.p[i])) {
            i++;
        }
        *value = pv__text(t.p, i);
        *quoted = 0;
        return i;
    }
    for (i = 1; i < t.n; i++) {
        char c = t.p[i];
        if (c == '"') {
            *value = pv__text(t.p + 1, i - 1);
            *quoted = 1;
            return i + 1;
        }
        if (c == '\r' || c == '\n') {
            break;
        }
        if (c == '\\' && i + 1 < t.n && pv__is_tspecial((unsigned char)t.p[i + 1])) {
            i++;
        }
    }
    return 0;
}

/* Next byte of a raw value from *at on, or -1. A backslash counts only before a special (Go's way with paths from
 * Windows). */
static int mt_char(const struct pv__mt_param *m, size_t *at) {
    if (*at == m->value.n) {
        return -1;
    }
    char c = m->value.p[(*at)++];
    if (m->quoted && c == '\\' && *at < m->value.n && pv__is_tspecial((unsigned char)m->value.p[*at])) {
        c = m->value.p[(*at)++];
    }
    return (unsigned char)c;
}

static int mt_same_value(const struct pv__mt_param *a, const struct pv__mt_param *b) {
    size_t i = 0;
    size_t j = 0;
    for (;;) {
        int x = mt_char(a, &i);
        if (x != mt_char(b, &j)) {
            return 0;
        }
        if (x < 0) {
            return 1;
        }
    }
}

/* One "; name=value" at the head of v. 1 and *rest, or 0. */
static int mt_param(pv_text v, struct pv__mt_param *m, pv_text *rest) {
    pv_text t = pv__trim_left(v);
    if (t.n == 0 || t.p[0] != ';') {
        return 0;
    }
    t = pv__trim_left(pv__text(t.p + 1, t.n - 1));
    size_t len = 0;
    while (len < t.n && pv__is_token((unsigned char)t.p[len])) {
        len++;
    }
    if (len == 0) {
        return 0;
    }
    m->key = pv__text(t.p, len);
    t = pv__trim_left(pv__text(t.p + len, t.n - len));
    if (t.n == 0 || t.p[0] != '=') {
        return 0;
    }
    t = pv__trim_left(pv__text(t.p + 1, t.n - 1));
    len = mt_value(t, &m->value, &m->quoted);
    if (len == 0) {
        return 0;
    }
    *rest = pv__text(t.p + len, t.n - len);
    return 1;
}

int pv__mt_parse(pv_text v, struct pv__mt *mt, pv_text *message) {
    const char *semicolon = v.n != 0 ? memchr(v.p, ';', v.n) : NULL;
    size_t base = semicolon != NULL ? (size_t)(semicolon - v.p) : v.n;
    mt->type = pv__trim(pv__text(v.p, base));
    mt->count = 0;
    *message = pv__text(NULL, 0);
    size_t len = type_token(mt->type);
    if (len == 0) {
        *message = PV__LIT("mime: no media type");
        return PV_EPARSE;
    }
    if (len < mt->type.n) {
        if (mt->type.p[len] != '/') {
            *message = PV__LIT("mime: expected slash after first token");
            return PV_EPARSE;
        }
        len++;
        size_t sub = type_token(pv__text(mt->type.p + len, mt->type.n - len));
        if (sub == 0) {
            *message = PV__LIT("mime: expected token after slash");
            return PV_EPARSE;
        }
        if (len + sub < mt->type.n) {
            *message = PV__LIT("mime: unexpected content after media subtype");
            return PV_EPARSE;
        }
    }
    v = pv__text(v.p + base, v.n - base);
    for (;;) {
        v = pv__trim_left(v);
        if (v.n == 0) {
            return 0;
        }
        struct pv__mt_param m;
        pv_text rest;
        if (!mt_param(v, &m, &rest)) {
            if (pv__eq(pv__trim(v), PV__LIT(";"))) {
                return 0; /* a trailing semicolon is no error */
            }
            *message = PV__LIT("mime: invalid media parameter");
            return PV_EPARSE;
        }
        v = rest;
        size_t i = 0;
        while (i < mt->count && !pv__eq_nocase(mt->params[i].key, m.key)) {
            i++;
        }
        if (i < mt->count) {
            if (!mt_same_value(&mt->params[i], &m)) {
                *message = PV__LIT("mime: duplicate parameter name");
                return PV_EPARSE;
            }
        } else if (mt->count == PV__MT_PARAMS) {
            *message = PV__LIT("mime: invalid media parameter");
            return PV_EPARSE;
        } else {
            mt->params[mt->count++] = m;
        }
    }
}

/* Index of the parameter called name + suffix, or -1. */
static ptrdiff_t mt_find(const struct pv__mt *mt, pv_text name, pv_text suffix) {
    for (size_t i = 0; i < mt->count; i++) {
        pv_text k = mt->params[i].key;
        if (k.n == name.n + suffix.n && pv__eq_nocase(pv__text(k.p, name.n), name) &&
            pv__same(k.p + name.n, suffix.n, suffix)) {
            return (ptrdiff_t)i;
        }
    }
    return -1;
}

/* Undoes percent encoding in place; 0 with a malformed one, and then *n is 0. */
static int percent_decode(char *p, size_t *n) {
    size_t out = 0;
    for (size_t i = 0; i < *n; i++) {
        if (p[i] != '%') {
            continue;
        }
        if (*n - i < 3 || pv__hex((unsigned char)p[i + 1]) < 0 || pv__hex((unsigned char)p[i + 2]) < 0) {
            *n = 0;
            return 0;
        }
        i += 2;
    }
    for (size_t i = 0; i < *n; i++) {
        char c = p[i];
        if (c == '%') {
            c = (char)(pv__hex((unsigned char)p[i + 1]) << 4 | pv__hex((unsigned char)p[i + 2]));
            i += 2;
        }
        p[out++] = c;
    }
    *n = out;
    return 1;
}

/* charset'language'percent-encoded, in place: *p and *n become the text. 0 if it is none, or in no known charset. */
static int rfc2231_decode(char **p, size_t *n) {
    char *first = memchr(*p, '\'', *n);
    if (first == NULL) {
        return 0;
    }
    pv_text charset = pv__text(*p, (size_t)(first - *p));
    size_t left = *n - charset.n - 1;
    char *second = memchr(first + 1, '\'', left);
    if (second == NULL || (!pv__eq_nocase(charset, PV__LIT("utf-8")) && !pv__eq_nocase(charset, PV__LIT("us-ascii")))) {
        return 0;
    }
    *n = left - (size_t)(second - first);
    *p = second + 1;
    return percent_decode(*p, n);
}

/* Appends a value's text to the arena; NULL without room. */
static char *mt_copy(const struct pv__mt_param *m, struct pv__arena *a, size_t *n) {
    char *p = pv__take(a, m->value.n);
    if (p == NULL) {
        return NULL;
    }
    size_t at = 0;
    size_t len = 0;
    int c;
    while ((c = mt_char(m, &at)) >= 0) {
        p[len++] = (char)c;
    }
    a->n -= m->value.n - len;
    *n = len;
    return p;
}

int pv__mt_get(const struct pv__mt *mt, pv_text name, struct pv__arena *a, pv_text *value) {
    *value = pv__text(NULL, 0);
    ptrdiff_t plain = mt_find(mt, name, PV__LIT(""));
    ptrdiff_t whole = mt_find(mt, name, PV__LIT("*"));
    char *p;
    size_t n = 0;
    if (whole >= 0) {
        p = mt_copy(&mt->params[whole], a, &n);
        if (p == NULL) {
            return PV_EBUFFER;
        }
        if (n != 0 && rfc2231_decode(&p, &n)) {
            *value = pv__text(p, n);
            return 1;
        }
    } else {
        /* name*0, name*1*, ...: joined, the encoded ones decoded */
        char *joined = a->p != NULL ? a->p + a->n : NULL;
        size_t total = 0;
        int valid = 0;
        for (size_t k = 0; k < mt->count; k++) {
            char suffix[24];
            struct pv__wr w = pv__writer(suffix, sizeof suffix);
            pv__put_char(&w, '*');
            pv__put_u64(&w, k);
            ptrdiff_t piece = mt_find(mt, name, pv__text(suffix, w.n));
            int encoded = piece < 0;
            if (encoded) {
                pv__put_char(&w, '*');
                piece = mt_find(mt, name, pv__text(suffix, w.n));
            }
            if (piece < 0) {
                break;
            }
            valid = 1;
            p = mt_copy(&mt->params[piece], a, &n);
            if (p == NULL) {
                return PV_EBUFFER;
            }
            size_t used = n;
            if (encoded && n != 0) {
                if (k == 0) {
                    n = rfc2231_decode(&p, &n) ? n : 0;
                } else {
                    (void)percent_decode(p, &n);
                }
            }
            if (n != 0) {
                memmove(joined + total, p, n);
            }
            a->n -= used - n;
            total += n;
        }
        if (valid) {
            *value = pv__text(joined, total);
            return 1;
        }
    }
    if (plain < 0) {
        return 0;
    }
    const struct pv__mt_param *m = &mt->params[plain];
    if (!m->quoted || m->value.n == 0 || memchr(m->value.p, '\\', m->value.n) == NULL) {
        *value = m->value;
        return 1;
    }
    p = mt_copy(m, a, &n);
    if (p == NULL) {
        return PV_EBUFFER;
    }
    *value = pv__text(p, n);
    return 1;
}

/* ------------------------------------------------------------------ media types by content (13.2) */

#define SNIFF_LEN 512

struct sniff_sig {
    const char *pattern; /* '?' in mask: any byte */
    const char *mask;    /* NULL: all bytes count */
    size_t len;
    int after_blanks;
    const char *type;
};

#define SIG(pattern, type) {"" pattern, NULL, sizeof(pattern) - 1, 0, type}
#define MASKED(pattern, mask, type) {"" pattern, "" mask, sizeof(pattern) - 1, 0, type}

static const char *const sniff_tags[] = {
    "<!DOCTYPE HTML", "<HTML",  "<HEAD", "<SCRIPT", "<IFRAME", "<H1", "<DIV", "<FONT", "<TABLE", "<A",
    "<STYLE",         "<TITLE", "<B",    "<BODY",   "<BR",     "<P",  "<!--",
};

/* In two runs, because the box format of MP4, which is no fixed pattern, comes between them. */
static const struct sniff_sig sniff_first[] = {
    {"<?xml", NULL, 5, 1, "text/xml; charset=utf-8"},
    SIG("%PDF-", "application/pdf"),
    SIG("%!PS-Adobe-", "application/postscript"),
    MASKED("\xfe\xff..", "xx??", "text/plain; charset=utf-16be"),
    MASKED("\xff\xfe..", "xx??", "text/plain; charset=utf-16le"),
    MASKED("\xef\xbb\xbf.", "xxx?", "text/plain; charset=utf-8"),
    SIG("\0\0\1\0", "image/x-icon"),
    SIG("\0\0\2\0", "image/x-icon"),
    SIG("BM", "image/bmp"),
    SIG("GIF87a", "image/gif"),
    SIG("GIF89a", "image/gif"),
    MASKED("RIFF....WEBPVP", "xxxx????xxxxxx", "image/webp"),
    SIG("\x89PNG\r\n\x1a\n", "image/png"),
    SIG("\xff\xd8\xff", "image/jpeg"),
    MASKED("FORM....AIFF", "xxxx????xxxx", "audio/aiff"),
    SIG("ID3", "audio/mpeg"),
    SIG("OggS\0", "application/ogg"),
    SIG("MThd\0\0\0\6", "audio/midi"),
    MASKED("RIFF....AVI ", "xxxx????xxxx", "video/avi"),
    MASKED("RIFF....WAVE", "xxxx????xxxx", "audio/wave"),
};

static const struct sniff_sig sniff_second[] = {
    SIG("\x1a\x45\xdf\xa3", "video/webm"),
    MASKED("..................................LP", "??????????????????????????????????xx",
           "application/vnd.ms-fontobject"),
    SIG("\0\1\0\0", "font/ttf"),
    SIG("OTTO", "font/otf"),
    SIG("ttcf", "font/collection"),
    SIG("wOFF", "font/woff"),
    SIG("wOF2", "font/woff2"),
    SIG("\x1f\x8b\x08", "application/x-gzip"),
    SIG("PK\3\4", "application/zip"),
    SIG("Rar!\x1a\7\0", "application/x-rar-compressed"),
    SIG("Rar!\x1a\7\1\0", "application/x-rar-compressed"),
    SIG("\0asm", "application/wasm"),
};

static int sniff_match(const struct sniff_sig *s, const uint8_t *p, size_t n) {
    if (n < s->len) {
        return 0;
    }
    for (size_t i = 0; i < s->len; i++) {
        if ((s->mask == NULL || s->mask[i] != '?') && p[i] != (uint8_t)s->pattern[i]) {
            return 0;
        }
    }
    return 1;
}

static int sniff_tag(const char *tag, const uint8_t *p, size_t n) {
    size_t len = strlen(tag);
    if (n < len + 1) {
        return 0;
    }
    for (size_t i = 0; i < len; i++) {
        uint8_t c = p[i];
        if (tag[i] >= 'A' && tag[i] <= 'Z') {
            c &= 0xdf;
        }
        if (c != (uint8_t)tag[i]) {
            return 0;
        }
    }
    return p[len] == ' ' || p[len] == '>';
}

static int sniff_mp4(const uint8_t *p, size_t n) {
    if (n < 12) {
        return 0;
    }
    size_t box = pv__get_be32(p);
    if (box > n || box % 4 != 0 || memcmp(p + 4, "ftyp", 4) != 0) {
        return 0;
    }
    for (size_t i = 8; i < box; i += 4) {
        if (i != 12 && memcmp(p + i, "mp4", 3) == 0) { /* at 12 stands a version number */
            return 1;
        }
    }
    return 0;
}

static const char *sniff_run(const struct sniff_sig *run, size_t count, const uint8_t *p, size_t n, size_t blanks) {
    for (size_t i = 0; i < count; i++) {
        size_t skip = run[i].after_blanks ? blanks : 0;
        if (sniff_match(&run[i], p + skip, n - skip)) {
            return run[i].type;
        }
    }
    return NULL;
}

const char *pv_sniff(const uint8_t *data, size_t len) {
    static const uint8_t nothing[1] = {0};
    if (len == 0) {
        data = nothing;
    }
    size_t n = len < SNIFF_LEN ? len : SNIFF_LEN;
    size_t blanks = 0;
    while (blanks < n && (data[blanks] == '\t' || data[blanks] == '\n' || data[blanks] == '\f' ||
                          data[blanks] == '\r' || data[blanks] == ' ')) {
        blanks++;
    }
    for (size_t i = 0; i < PV__ARRAY_LEN(sniff_tags); i++) {
        if (sniff_tag(sniff_tags[i], data + blanks, n - blanks)) {
            return "text/html; charset=utf-8";
        }
    }
    const char *type = sniff_run(sniff_first, PV__ARRAY_LEN(sniff_first), data, n, blanks);
    if (type == NULL && sniff_mp4(data, n)) {
        type = "video/mp4";
    }
    if (type == NULL) {
        type = sniff_run(sniff_second, PV__ARRAY_LEN(sniff_second), data, n, blanks);
    }
    if (type != NULL) {
        return type;
    }
    for (size_t i = blanks; i < n; i++) {
        uint8_t c = data[i];
        if (c <= 0x08 || c == 0x0b || (c >= 0x0e && c <= 0x1a) || (c >= 0x1c && c <= 0x1f)) {
            return "application/octet-stream";
        }
    }
    return "text/plain; charset=utf-8";
}

/* ------------------------------------------------------------------ media types by extension (13.3) */

struct mime_entry {
    char *text; /* extension, then type; NULL: free slot */
    size_t ext_len;
    size_t type_len;
};

struct mime_map {
    struct mime_entry *slots;
    size_t mask; /* number of slots - 1 */
    size_t used;
};

struct pv_mime {
    struct mime_map exact;
    struct mime_map lower;
    int sealed;
};

#define MIME_SLOTS 2048 /* to begin with; a desktop's globs2 has about 1,300 extensions */

/* An extension's bytes one by one, in lower case if wanted. */
static int ext_next(pv_text ext, size_t *at, int lower) {
    if (*at == ext.n) {
        return -1;
    }
    if (!lower) {
        return (unsigned char)ext.p[(*at)++];
    }
    unsigned char c;
    size_t len = type_char(ext.p + *at, ext.n - *at, &c);
    *at += len != 0 ? len : 1;
    return c;
}

static struct mime_entry *mime_slot(const struct mime_map *m, pv_text ext, int lower) {
    uint32_t hash = 2166136261U;
    size_t at = 0;
    int c;
    while ((c = ext_next(ext, &at, lower)) >= 0) {
        hash = (hash ^ (uint32_t)c) * 16777619U;
    }
    for (size_t i = hash & m->mask;; i = (i + 1) & m->mask) { /* ends: a map is never full */
        struct mime_entry *e = &m->slots[i];
        if (e->text == NULL) {
            return e;
        }
        size_t k = 0;
        at = 0;
        while (k < e->ext_len && ext_next(ext, &at, lower) == (unsigned char)e->text[k]) {
            k++;
        }
        if (k == e->ext_len && at == ext.n) {
            return e;
        }
    }
}

static int mime_grow(struct mime_map *m) {
    size_t slots = m->slots == NULL ? MIME_SLOTS : (m->mask + 1) * 2;
    struct mime_map bigger = {pv__calloc(slots, sizeof *bigger.slots), slots - 1, m->used};
    if (bigger.slots == NULL) {
        return PV_ENOMEM;
    }
    for (size_t i = 0; m->slots != NULL && i <= m->mask; i++) {
        if (m->slots[i].text != NULL) {
            *mime_slot(&bigger, pv__text(m->slots[i].text, m->slots[i].ext_len), 0) = m->slots[i];
        }
    }
    pv__free(m->slots);
    *m = bigger;
    return 0;
}

static int mime_set(struct mime_map *m, pv_text ext, pv_text type, int lower) {
    if (m->slots == NULL || m->used + 1 > (m->mask + 1) / 2) {
        int rc = mime_grow(m);
        if (rc < 0) {
            return rc;
        }
    }
    char *text = pv__malloc(ext.n + type.n + 1);
    if (text == NULL) {
        return PV_ENOMEM;
    }
    size_t n = 0;
    size_t at = 0;
    int c;
    while ((c = ext_next(ext, &at, lower)) >= 0) {
        text[n++] = (char)c;
    }
    if (type.n != 0) {
        memcpy(text + n, type.p, type.n);
    }
    struct mime_entry *e = mime_slot(m, ext, lower);
    m->used += e->text == NULL;
    pv__free(e->text);
    e->text = text;
    e->ext_len = n;
    e->type_len = type.n;
    return 0;
}

static void mime_clear(struct mime_map *m) {
    for (size_t i = 0; m->slots != NULL && i <= m->mask; i++) {
        pv__free(m->slots[i].text);
    }
    pv__free(m->slots);
    m->slots = NULL;
}

/* Go's setExtensionType: 1 set, 0 the type is none, PV_ENOMEM. */
static int mime_add(pv_mime *m, pv_text ext, pv_text type) {
    struct pv__mt mt;
    pv_text message;
    if (pv__mt_parse(type, &mt, &message) < 0) {
        return 0;
    }
    char *made = NULL;
    if (pv__starts(type, PV__LIT("text/"))) {
        char room[8];
        struct pv__arena a = {room, sizeof room, 0};
        pv_text charset;
        int rc = pv__mt_get(&mt, PV__LIT("charset"), &a, &charset); /* PV_EBUFFER: a long one, so not empty */
        if (rc == 0 || (rc == 1 && charset.n == 0)) {
            /* Go adds the charset, which leaves an empty text of a type that has parameters (or is padded) */
            size_t tokens = 0;
            while (tokens < type.n && (pv__is_token((unsigned char)type.p[tokens]) || tokens == 4)) {
                tokens++;
            }
            if (tokens < type.n) {
                type = pv__text(NULL, 0);
            } else {
                struct pv__wr w = pv__writer(pv__malloc(type.n + 32), type.n + 32);
                made = w.p;
                if (made == NULL) {
                    return PV_ENOMEM;
                }
                for (size_t i = 0; i < type.n; i++) {
                    pv__put_char(&w, (char)pv__lower((unsigned char)type.p[i]));
                }
                PV__PUT(&w, "; charset=utf-8");
                type = pv__text(made, w.n);
            }
        }
    }
    int rc = mime_set(&m->exact, ext, type, 0);
    if (rc == 0) {
        rc = mime_set(&m->lower, ext, type, 1);
    }
    pv__free(made);
    return rc < 0 ? rc : 1;
}

static int mime_add_table(pv_mime *m, const struct pv__ext_type *table, size_t count) {
    for (size_t i = 0; i < count; i++) {
        int rc = mime_add(m, pv__cstr(table[i].ext), pv__cstr(table[i].type));
        if (rc < 0) {
            return rc;
        }
    }
    return 0;
}

int pv_mime_new(pv_mime **out) {
    *out = NULL;
    pv_mime *m = pv__calloc(1, sizeof *m);
    if (m == NULL) {
        return PV_ENOMEM;
    }
    int rc = mime_add_table(m, pv__go_types, PV__ARRAY_LEN(pv__go_types));
    if (rc < 0) {
        pv_mime_free(m);
        return rc;
    }
    *out = m;
    return 0;
}

void pv_mime_free(pv_mime *m) {
    if (m != NULL) {
        mime_clear(&m->exact);
        mime_clear(&m->lower);
        pv__free(m);
    }
}

int pv_mime_add(pv_mime *m, const char *ext, size_t ext_len, const char *type, size_t type_len, int only_new) {
    if (m->sealed) {
        return PV_EINVAL;
    }
    pv_text e = pv__text(ext, ext_len);
    if (only_new && mime_slot(&m->exact, e, 0)->text != NULL) {
        return 0;
    }
    return mime_add(m, e, pv__text(type, type_len));
}

int pv_mime_seal(pv_mime *m) {
    int rc = m->sealed ? 0 : mime_add_table(m, pv__upstream_types, PV__ARRAY_LEN(pv__upstream_types));
    m->sealed = rc == 0;
    return rc;
}

int pv_mime_lookup(const pv_mime *m, const char *ext, size_t ext_len, pv_text *type) {
    pv_text e = pv__text(ext, ext_len);
    const struct mime_entry *hit = mime_slot(&m->exact, e, 0);
    if (hit->text == NULL) {
        hit = mime_slot(&m->lower, e, 1);
    }
    *type = hit->text != NULL ? pv__text(hit->text + hit->ext_len, hit->type_len) : pv__text(NULL, 0);
    return type->n != 0;
}

int pv__mime_lookup_lower(const pv_mime *m, pv_text ext, pv_text *type) {
    const struct mime_entry *hit = mime_slot(&m->exact, ext, 1);
    if (hit->text == NULL) {
        hit = mime_slot(&m->lower, ext, 1);
    }
    *type = hit->text != NULL ? pv__text(hit->text + hit->ext_len, hit->type_len) : pv__text(NULL, 0);
    return type->n != 0;
}

void pv_name_ext(const char *name, size_t n, pv_text *ext) {
    *ext = pv__text(NULL, 0);
    for (size_t i = n; i > 0 && name[i - 1] != '/'; i--) {
        if (name[i - 1] == '.') {
            *ext = pv__text(name + i - 1, n - i + 1);
            return;
        }
    }
}
