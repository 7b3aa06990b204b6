/* pv_http_int.h - what the sources of the HTTP part (pv_http.c, pv_http_text.c, pv_http_upload.c) share: a bounded
 * writer, character classes, small text helpers, the media type parser. Internal to them.
 */
#ifndef PV_HTTP_INT_H
#define PV_HTTP_INT_H

#include "pv_int.h"

/* ------------------------------------------------------------------ texts */

static inline pv_text pv__text(const char *p, size_t n) {
    pv_text t = {p, n};
    return t;
}

#define PV__LIT(s) pv__text("" s, sizeof(s) - 1)

/* Bytes [from, to) of a text. */
static inline pv_text pv__slice(pv_text t, size_t from, size_t to) {
    return pv__text(t.p != NULL ? t.p + from : NULL, to - from);
}

static inline pv_text pv__cstr(const char *s) {
    return pv__text(s, strlen(s));
}

static inline int pv__same(const char *p, size_t n, pv_text b) {
    return n == b.n && (n == 0 || memcmp(p, b.p, n) == 0);
}

static inline int pv__eq(pv_text a, pv_text b) {
    return pv__same(a.p, a.n, b);
}

static inline int pv__starts(pv_text a, pv_text prefix) {
    return a.n >= prefix.n && (prefix.n == 0 || memcmp(a.p, prefix.p, prefix.n) == 0);
}

static inline int pv__ends(pv_text a, pv_text suffix) {
    return a.n >= suffix.n && (suffix.n == 0 || memcmp(a.p + a.n - suffix.n, suffix.p, suffix.n) == 0);
}

static inline int pv__contains(pv_text a, pv_text part) {
    return a.n >= part.n && memmem(a.p, a.n, part.p, part.n) != NULL;
}

/* Index of the last c, or -1. */
static inline ptrdiff_t pv__last(pv_text a, char c) {
    const char *hit = a.n != 0 ? memrchr(a.p, c, a.n) : NULL;
    return hit != NULL ? hit - a.p : -1;
}

/* ------------------------------------------------------------------ writer
 * Counts all, stores only what fits: n > cap afterwards means that the buffer was too small. */

struct pv__wr {
    char *p;
    size_t cap;
    size_t n;
};

static inline struct pv__wr pv__writer(char *buf, size_t cap) {
    struct pv__wr w = {buf, buf != NULL ? cap : 0, 0};
    return w;
}

static inline void pv__put(struct pv__wr *w, const char *s, size_t n) {
    if (n != 0 && w->n <= w->cap && n <= w->cap - w->n) {
        memcpy(w->p + w->n, s, n);
    }
    w->n += n;
}

static inline void pv__put_text(struct pv__wr *w, pv_text t) {
    pv__put(w, t.p, t.n);
}

static inline void pv__put_char(struct pv__wr *w, char c) {
    if (w->n < w->cap) {
        w->p[w->n] = c;
    }
    w->n++;
}

#define PV__PUT(w, literal) pv__put((w), "" literal, sizeof(literal) - 1)

void pv__put_u64(struct pv__wr *w, uint64_t v);
void pv__put_i64(struct pv__wr *w, int64_t v);
void pv__put_hex(struct pv__wr *w, uint64_t v, unsigned min_digits, const char *digits16);
void pv__put_json(struct pv__wr *w, pv_text t);  /* with quotes */
void pv__put_quote(struct pv__wr *w, pv_text t); /* Go's %q */

extern const char pv__hex_lower[16];
extern const char pv__hex_upper[16];

/* ------------------------------------------------------------------ characters */

#define PV__BIT(c) ((uint64_t)1 << ((c) & 63))
#define PV__DIGITS ((uint64_t)0x3ff << '0')
#define PV__LETTERS (((uint64_t)0x3ffffff << ('A' - 64)) | ((uint64_t)0x3ffffff << ('a' - 64)))

static inline int pv__in(uint64_t low, uint64_t high, unsigned char c) {
    return c < 64 ? (int)(low >> c & 1) : c < 128 ? (int)(high >> (c - 64) & 1) : 0;
}

/* Token character of a header name (RFC 9110). */
static inline int pv__is_field(unsigned char c) {
    return pv__in(PV__DIGITS | PV__BIT('!') | PV__BIT('#') | PV__BIT('$') | PV__BIT('%') | PV__BIT('&') |
                      PV__BIT('\'') | PV__BIT('*') | PV__BIT('+') | PV__BIT('-') | PV__BIT('.'),
                  PV__LETTERS | PV__BIT('^') | PV__BIT('_') | PV__BIT('`') | PV__BIT('|') | PV__BIT('~'), c);
}

/* Token character of a media type (RFC 2045: braces, too). */
static inline int pv__is_token(unsigned char c) {
    return pv__is_field(c) || c == '{' || c == '}';
}

static inline int pv__is_tspecial(unsigned char c) {
    return pv__in(PV__BIT('(') | PV__BIT(')') | PV__BIT('<') | PV__BIT('>') | PV__BIT(',') | PV__BIT(';') |
                      PV__BIT(':') | PV__BIT('"') | PV__BIT('/') | PV__BIT('?') | PV__BIT('='),
                  PV__BIT('@') | PV__BIT('\\') | PV__BIT('[') | PV__BIT(']'), c);
}

static inline unsigned char pv__lower(unsigned char c) {
    return c >= 'A' && c <= 'Z' ? (unsigned char)(c + 32) : c;
}

static inline unsigned char pv__upper(unsigned char c) {
    return c >= 'a' && c <= 'z' ? (unsigned char)(c - 32) : c;
}

static inline int pv__is_digit(unsigned char c) {
    return c >= '0' && c <= '9';
}

/* Value of a hex digit, or -1. */
static inline int pv__hex(unsigned char c) {
    return pv__is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Length of the UTF-8 sequence at p (n > 0 bytes there) and its code point; 0 if it is none: then its first byte alone
 * stands for U+FFFD. */
size_t pv__rune(const char *p, size_t n, uint32_t *cp);
/* Without Unicode white space at either end, or at the left end only. */
pv_text pv__trim(pv_text t);
pv_text pv__trim_left(pv_text t);
int pv__eq_nocase(pv_text a, pv_text b); /* ASCII only */

/* ------------------------------------------------------------------ numbers */

enum pv__num { PV__NUM_OK = 0, PV__NUM_SYNTAX = 1, PV__NUM_RANGE = 2 };
/* Go's ParseUint for base 10 or 16; with PV__NUM_RANGE *v is UINT64_MAX, with PV__NUM_SYNTAX 0. */
enum pv__num pv__uint(pv_text t, unsigned base, uint64_t *v);
/* Go's ParseInt with base 10. */
enum pv__num pv__int(pv_text t, int64_t *v);

/* ------------------------------------------------------------------ room for texts that must be rewritten */

struct pv__arena {
    char *p;
    size_t cap;
    size_t n;
};

static inline char *pv__take(struct pv__arena *a, size_t n) {
    if (n > a->cap - a->n) {
        return NULL;
    }
    a->n += n;
    return a->p + (a->n - n);
}

/* ------------------------------------------------------------------ media types with parameters as Go reads them */

#define PV__MT_PARAMS 128 /* more are refused as malformed: the test for repeated names is quadratic */

struct pv__mt_param {
    pv_text key;
    pv_text value; /* a quoted one without its quotes, still escaped */
    int quoted;
};

struct pv__mt {
    pv_text type; /* as written, without blanks around it */
    size_t count;
    struct pv__mt_param params[PV__MT_PARAMS];
};

/* 0, or PV_EPARSE and Go's text in *message. */
int pv__mt_parse(pv_text v, struct pv__mt *mt, pv_text *message) PV_WUR;
/* Whether the type is this lower-case one. */
int pv__mt_is(const struct pv__mt *mt, pv_text type);
/* Value of a parameter (lower-case name), continuations and RFC 2231 encoding resolved, in v or in the arena.
 * 1 found, 0 absent, PV_EBUFFER. */
int pv__mt_get(const struct pv__mt *mt, pv_text name, struct pv__arena *a, pv_text *value) PV_WUR;

/* As pv_mime_lookup for the lower-case form of an extension. */
int pv__mime_lookup_lower(const pv_mime *m, pv_text ext, pv_text *type);

/* ------------------------------------------------------------------ JSON objects */

/* Bytes of a text, or of a JSON string between its quotes, decoded: escapes resolved, what is not UTF-8 as U+FFFD. */
struct pv__chars {
    const char *p;
    const char *end;
    int json;
    unsigned pending;
    unsigned char queue[4];
};

static inline struct pv__chars pv__chars(pv_text t, int json) {
    struct pv__chars c = {t.p, t.n != 0 ? t.p + t.n : t.p, json, 0, {0}};
    return c;
}

/* Next byte, or -1 at the end. The JSON string must have been checked before. */
int pv__chars_next(struct pv__chars *c);

/* Checks a whole document. 0 when it is JSON and an object; else PV_EPARSE and the position. */
int pv__json_object(pv_text json, size_t *at) PV_WUR;
/* Members of a checked object: *at is 0 at first. 1 with the texts between the quotes (value: an empty text if it is no
 * string), 0 at the end. */
int pv__json_member(pv_text json, size_t *at, pv_text *name, pv_text *value);

#endif
