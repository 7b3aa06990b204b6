/* pv_http_upload.c - what a POST or PUT carries: form check, multipart bodies as Go's mime/multipart reads them, names,
 * media types, quoted-printable, pairs, ttl, the compression rule and the JSON reply. Pure functions; texts that must
 * be rewritten go into the caller's scratch.
 */
#include "pv_http_int.h"

/* ------------------------------------------------------------------ names */

/* Last element of a path: trailing separators cut, "/" if there was nothing else, "." for an empty text. With both the
 * backslash separates, too. */
static pv_text base_name(pv_text t, int both) {
    if (t.n == 0) {
        return PV__LIT(".");
    }
    while (t.n != 0 && (t.p[t.n - 1] == '/' || (both && t.p[t.n - 1] == '\\'))) {
        t.n--;
    }
    if (t.n == 0) {
        return PV__LIT("/");
    }
    size_t from = t.n;
    while (from > 0 && t.p[from - 1] != '/' && !(both && t.p[from - 1] == '\\')) {
        from--;
    }
    return pv__slice(t, from, t.n);
}

/* ------------------------------------------------------------------ form check (8.1) */

int pv_form_check(const char *content_type, size_t n, pv_text *message) {
    struct pv__mt mt;
    *message = pv__text(NULL, 0);
    if (n == 0) {
        return 0;
    }
    if (pv__mt_parse(pv__text(content_type, n), &mt, message) < 0) {
        return PV_EPARSE;
    }
    return pv__mt_is(&mt, PV__LIT("application/x-www-form-urlencoded"));
}

/* ------------------------------------------------------------------ quoted-printable */

#define LINE_MAX_BYTES 4096 /* buffer of Go's readers: a longer line is an error of theirs */

enum qp_verdict { QP_OK, QP_BYTE, QP_HEX, QP_AFTER, QP_SHORT, QP_LONG };

/* Decodes in into out, which may be in or, to count only, NULL. cut: no boundary ended it. Stops behind limit bytes.
 * *bad: the offending bytes of QP_BYTE, QP_HEX and QP_AFTER. */
static enum qp_verdict qp_run(pv_text in, int cut, unsigned char *out, size_t limit, size_t *out_len, pv_text *bad) {
    enum qp_verdict end = QP_OK;
    size_t n = 0;
    *out_len = 0;
    while (in.n != 0 && end == QP_OK) {
        const char *newline = memchr(in.p, '\n', in.n < LINE_MAX_BYTES ? in.n : LINE_MAX_BYTES);
        size_t whole = newline != NULL ? (size_t)(newline - in.p) + 1 : in.n;
        if (newline == NULL && in.n >= LINE_MAX_BYTES) {
            whole = LINE_MAX_BYTES;
            end = QP_LONG;
        }
        int last = newline == NULL && end == QP_OK && !cut;
        size_t len = whole; /* without blanks and line end */
        while (len != 0 &&
               (in.p[len - 1] == '\n' || in.p[len - 1] == '\r' || in.p[len - 1] == ' ' || in.p[len - 1] == '\t')) {
            len--;
        }
        size_t tail = 0; /* bytes of the line end that are kept: they follow the text without the blanks */
        if (len != 0 && in.p[len - 1] == '=') {
            size_t rest = len;
            while (rest < whole && (in.p[rest] == ' ' || in.p[rest] == '\t')) {
                rest++;
            }
            int line_end = (rest < whole && in.p[rest] == '\n') ||
                           (whole - rest >= 2 && in.p[rest] == '\r' && in.p[rest + 1] == '\n');
            if (!line_end && !(rest == whole && len > 1 && last)) {
                end = QP_AFTER;
                *bad = pv__slice(in, rest, whole);
            }
            len--;
        } else if (newline != NULL) {
            tail = whole >= 2 && in.p[whole - 2] == '\r' ? 2 : 1;
        }
        for (size_t i = 0; i < len + tail; i++) {
            size_t left = len + tail - i;
            /* bytes behind the text are the kept line end */
            unsigned char c = (unsigned char)(i < len ? in.p[i] : in.p[whole - left]);
            if (c == '=') {
                /* what follows within the text; a soft line end was cut off above, so no kept one follows an '=' */
                int high = i + 2 < len ? pv__hex((unsigned char)in.p[i + 1]) : -1;
                int low = i + 2 < len ? pv__hex((unsigned char)in.p[i + 2]) : -1;
                if (high >= 0 && low >= 0) {
                    c = (unsigned char)(high << 4 | low);
                    i += 2;
                } else if (i + 1 == len) {
                    *out_len = n;
                    return QP_SHORT;
                } else if (in.p[i + 1] == '\r') {
                    *bad = pv__slice(in, i + 1, i + 2);
                    *out_len = n;
                    return left > 2 ? QP_HEX : QP_SHORT;
                } /* else it stands for itself */
            } else if (c < 0x80 && (c < ' ' || c > '~') && c != '\t' && c != '\r' && c != '\n') {
                *bad = pv__slice(in, i, i + 1);
                *out_len = n;
                return QP_BYTE;
            }
            if (out != NULL) {
                out[n] = c;
            }
            n++;
            if (n == limit) {
                *out_len = n;
                return QP_OK;
            }
        }
        in = pv__slice(in, whole, in.n);
    }
    *out_len = n;
    return end;
}

int pv_qp_decode(const uint8_t *in, size_t len, uint8_t *out, size_t cap, size_t *out_len) {
    pv_text bad;
    pv_text t = pv__text((const char *)in, len);
    if (qp_run(t, 0, NULL, SIZE_MAX, out_len, &bad) != QP_OK) {
        return PV_EPARSE;
    }
    if (*out_len > cap) {
        return PV_EBUFFER;
    }
    return qp_run(t, 0, out, SIZE_MAX, out_len, &bad) == QP_OK ? 0 : PV_EPARSE;
}

/* ------------------------------------------------------------------ multipart bodies (8.3) */

#define PART_HEADERS_MAX 10000
#define PART_HEADER_BYTES (10 * 1024 * 1024)
#define PART_HEADER_COST 200 /* Go's reckoning of memory: per header, and 400 to begin with */
#define PART_MAP_COST 400
#define INITIAL_LINE_MAX 80

struct reader {
    pv_text body;
    size_t at;
    pv_text boundary;
    int bare_newlines; /* lines end in LF, since the first boundary's did */
    struct pv__arena *arena;
    pv_text message; /* of the error */
};

struct part {
    pv_text disposition;
    pv_text type;
    pv_text md5;
    pv_text encoding;
    pv_text transfer;
};

/* Says what went wrong: a constant text, and maybe the offending bytes as %q. PV_EPARSE or PV_EBUFFER. */
static int refuse(struct reader *r, pv_text text, const pv_text *quoted) {
    r->message = text;
    if (quoted == NULL) {
        return PV_EPARSE;
    }
    struct pv__wr w = pv__writer(r->arena->p + r->arena->n, r->arena->cap - r->arena->n);
    pv__put_text(&w, text);
    pv__put_quote(&w, *quoted);
    if (pv__take(r->arena, w.n) == NULL) {
        return PV_EBUFFER;
    }
    r->message = pv__text(w.p, w.n);
    return PV_EPARSE;
}

/* Next line with its end, as bufio's ReadSlice on a buffer of 4096. 1; 0 at the end (what is left is in *line); -1 too
 * long. */
static int read_slice(struct reader *r, pv_text *line) {
    pv_text left = pv__slice(r->body, r->at, r->body.n);
    size_t window = left.n < LINE_MAX_BYTES ? left.n : LINE_MAX_BYTES;
    const char *newline = window != 0 ? memchr(left.p, '\n', window) : NULL;
    if (newline == NULL) {
        *line = left;
        r->at = r->body.n;
        return left.n >= LINE_MAX_BYTES ? -1 : 0;
    }
    *line = pv__slice(left, 0, (size_t)(newline - left.p) + 1);
    r->at += line->n;
    return 1;
}

/* Next line without its end, of any length (the last one needs no end). 0 if nothing is left. */
static int read_line(struct reader *r, pv_text *line) {
    pv_text left = pv__slice(r->body, r->at, r->body.n);
    if (left.n == 0) {
        return 0;
    }
    const char *newline = memchr(left.p, '\n', left.n);
    if (newline == NULL) {
        *line = left;
        r->at = r->body.n;
        return 1;
    }
    size_t len = (size_t)(newline - left.p);
    r->at += len + 1;
    *line = pv__slice(left, 0, len > 0 && left.p[len - 1] == '\r' ? len - 1 : len);
    return 1;
}

static pv_text skip_blanks(pv_text t) {
    while (t.n != 0 && (t.p[0] == ' ' || t.p[0] == '\t')) {
        t = pv__slice(t, 1, t.n);
    }
    return t;
}

static pv_text trim_blanks(pv_text t) {
    t = skip_blanks(t);
    while (t.n != 0 && (t.p[t.n - 1] == ' ' || t.p[t.n - 1] == '\t')) {
        t.n--;
    }
    return t;
}

static int is_blank_at(const struct reader *r) {
    return r->at < r->body.n && (r->body.p[r->at] == ' ' || r->body.p[r->at] == '\t');
}

/* Joins a header line with those that continue it: *kv, in the arena if there are any. */
static int unfold(struct reader *r, pv_text *kv, int64_t room) {
    if (!is_blank_at(r)) {
        return 0;
    }
    char *joined = r->arena->p + r->arena->n;
    size_t n = 0;
    pv_text piece = *kv;
    int more = 1;
    for (;;) {
        if ((int64_t)(n + piece.n) > room) {
            return refuse(r, PV__LIT("multipart: message too large"), NULL);
        }
        char *p = pv__take(r->arena, piece.n + (size_t)more);
        if (p == NULL) {
            return PV_EBUFFER;
        }
        if (piece.n != 0) {
            memcpy(p, piece.p, piece.n);
        }
        if (more) {
            p[piece.n] = ' ';
        }
        n += piece.n + (size_t)more;
        if (!more) {
            *kv = pv__text(joined, n);
            return 0;
        }
        while (is_blank_at(r)) {
            r->at++;
        }
        if (!read_line(r, &piece)) {
            *kv = pv__text(joined, n);
            return 0;
        }
        piece = trim_blanks(piece);
        more = is_blank_at(r);
    }
}

/* Refuses a header line. Go has brought the name, if that was one, into canonical case when it looks at the value. */
static int refuse_header(struct reader *r, pv_text kv, size_t key_len) {
    static const pv_text malformed = {"malformed MIME header line: ", 28};
    if (memchr(kv.p, ' ', key_len) == NULL) {
        char *copy = pv__take(r->arena, kv.n);
        if (copy == NULL) {
            return PV_EBUFFER;
        }
        memcpy(copy, kv.p, kv.n);
        (void)pv_header_canonical(kv.p, key_len, copy, key_len);
        kv.p = copy;
    }
    return refuse(r, malformed, &kv);
}

/* Header block of a part, up to and with its blank line. 0, PV_EPARSE, PV_EBUFFER. */
static int read_headers(struct reader *r, struct part *part) {
    static const pv_text too_large = {"multipart: message too large", 28};
    memset(part, 0, sizeof *part);
    int64_t room = PART_HEADER_BYTES - PART_MAP_COST;
    pv_text line;
    if (is_blank_at(r)) {
        if (!read_line(r, &line)) {
            return refuse(r, PV__LIT("EOF"), NULL);
        }
        if (line.n > INITIAL_LINE_MAX) {
            return refuse(r, too_large, NULL);
        }
        return refuse(r, PV__LIT("malformed MIME header initial line: "), &line);
    }
    for (int count = 0;; count++) {
        if (!read_line(r, &line)) {
            return refuse(r, PV__LIT("EOF"), NULL);
        }
        if ((int64_t)line.n > room) {
            return refuse(r, too_large, NULL);
        }
        if (line.n == 0) {
            return 0;
        }
        if (memchr(line.p, ':', line.n) == NULL) {
            return refuse(r, PV__LIT("malformed MIME header: missing colon: "), &line);
        }
        size_t mark = r->arena->n;
        pv_text kv = trim_blanks(line);
        int rc = unfold(r, &kv, room);
        if (rc < 0) {
            return rc;
        }
        size_t colon = (size_t)((const char *)memchr(kv.p, ':', kv.n) - kv.p);
        pv_text key = pv__slice(kv, 0, colon);
        pv_text value = pv__slice(kv, colon + 1, kv.n);
        int key_ok = key.n != 0;
        for (size_t i = 0; i < key.n; i++) {
            key_ok &= pv__is_field((unsigned char)key.p[i]) || key.p[i] == ' ';
        }
        int ok = key_ok;
        for (size_t i = 0; i < value.n; i++) {
            unsigned char c = (unsigned char)value.p[i];
            ok &= (c >= ' ' && c != 0x7f) || c == '\t';
        }
        if (!ok) {
            return refuse_header(r, kv, key_ok ? key.n : 0);
        }
        if (count == PART_HEADERS_MAX) {
            return refuse(r, too_large, NULL);
        }
        value = skip_blanks(value);
        room -= (int64_t)key.n + PART_HEADER_COST + (int64_t)value.n;
        if (room < 0) {
            return refuse(r, too_large, NULL);
        }
        pv_text *slot = pv__eq_nocase(key, PV__LIT("Content-Disposition"))         ? &part->disposition
                        : pv__eq_nocase(key, PV__LIT("Content-Type"))              ? &part->type
                        : pv__eq_nocase(key, PV__LIT("Content-Md5"))               ? &part->md5
                        : pv__eq_nocase(key, PV__LIT("Content-Encoding"))          ? &part->encoding
                        : pv__eq_nocase(key, PV__LIT("Content-Transfer-Encoding")) ? &part->transfer
                                                                                   : NULL;
        if (slot != NULL && slot->p == NULL) {
            *slot = value; /* the first of a name counts; p tells an empty one from none */
        } else {
            r->arena->n = mark;
        }
    }
}

/* Text behind "--boundary" + suffix at the head of t. 1 if it begins so. */
static int after_dashes(const struct reader *r, pv_text t, pv_text suffix, pv_text *rest) {
    if (t.n < 2 + r->boundary.n + suffix.n || t.p[0] != '-' || t.p[1] != '-' ||
        !pv__starts(pv__slice(t, 2, t.n), r->boundary) || !pv__starts(pv__slice(t, 2 + r->boundary.n, t.n), suffix)) {
        return 0;
    }
    *rest = pv__slice(t, 2 + r->boundary.n + suffix.n, t.n);
    return 1;
}

static int is_newline(const struct reader *r, pv_text t) {
    return r->bare_newlines ? pv__eq(t, PV__LIT("\n")) : pv__eq(t, PV__LIT("\r\n"));
}

static int is_final(const struct reader *r, pv_text line) {
    pv_text rest;
    if (!after_dashes(r, line, PV__LIT("--"), &rest)) {
        return 0;
    }
    rest = skip_blanks(rest);
    return rest.n == 0 || is_newline(r, rest);
}

/* Goes to the next part and reads its headers. 0, PV_EPARSE (also "EOF" where no more parts follow), PV_EBUFFER. */
static int next_part(struct reader *r, int first, struct part *part) {
    if (r->boundary.n == 0) {
        return refuse(r, PV__LIT("multipart: boundary is empty"), NULL);
    }
    int expect = 0;
    for (;;) {
        pv_text line;
        int got = read_slice(r, &line);
        if (got == 0) {
            return refuse(r, is_final(r, line) ? PV__LIT("EOF") : PV__LIT("multipart: NextPart: EOF"), NULL);
        }
        if (got < 0) {
            return refuse(r, PV__LIT("multipart: NextPart: bufio: buffer full"), NULL);
        }
        pv_text rest;
        if (after_dashes(r, line, PV__LIT(""), &rest)) {
            rest = skip_blanks(rest);
            if (first && pv__eq(rest, PV__LIT("\n"))) {
                r->bare_newlines = 1;
            }
            if (is_newline(r, rest)) {
                return read_headers(r, part);
            }
        }
        if (is_final(r, line)) {
            return refuse(r, PV__LIT("EOF"), NULL);
        }
        if (expect) {
            return refuse(r, PV__LIT("multipart: expecting a new Part; got line "), &line);
        }
        if (first) {
            continue; /* preamble */
        }
        if (!is_newline(r, line)) {
            return refuse(r, PV__LIT("multipart: unexpected line in Next(): "), &line);
        }
        expect = 1;
    }
}

/* What follows a "--boundary": 1 it is one, 0 it is not (Go's matchAfterPrefix). */
static int ends_boundary(pv_text rest) {
    return rest.n == 0 || rest.p[0] == ' ' || rest.p[0] == '\t' || rest.p[0] == '\r' || rest.p[0] == '\n' ||
           (rest.n >= 2 && rest.p[0] == '-' && rest.p[1] == '-');
}

/* The first newline of t, or NULL. By memchr: memmem goes byte by byte for a needle this short. */
static const char *find_newline(pv_text t, pv_text newline) {
    const char *at = t.p;
    const char *end = t.p + t.n;
    while (at < end && (at = memchr(at, newline.p[0], (size_t)(end - at))) != NULL) {
        if ((size_t)(end - at) >= newline.n && memcmp(at, newline.p, newline.n) == 0) {
            return at;
        }
        at++;
    }
    return NULL;
}

/* Bytes of a part from r->at on: *data, and r->at behind them. 1 if a boundary ends them, 0 if the body just stops
 * (*data is what Go would still have given out), -1 if it stops behind what could have been one: then Go reports the
 * end together with the last byte. */
static int part_data(struct reader *r, pv_text *data) {
    pv_text t = pv__slice(r->body, r->at, r->body.n);
    pv_text newline = r->bare_newlines ? PV__LIT("\n") : PV__LIT("\r\n");
    pv_text rest;
    size_t at = 0;
    int stop = 0;
    *data = pv__slice(t, 0, 0);
    if (after_dashes(r, t, PV__LIT(""), &rest)) {
        if (ends_boundary(rest)) {
            return 1;
        }
        at = t.n - rest.n;
        stop = pv__eq(rest, PV__LIT("-")) ? -1 : 0;
    } else if (t.n < 2 + r->boundary.n && memcmp("--", t.p != NULL ? t.p : "", t.n < 2 ? t.n : 2) == 0 &&
               (t.n <= 2 || pv__starts(r->boundary, pv__slice(t, 2, t.n)))) {
        r->at = r->body.n; /* the beginning of one: not data */
        return 0;
    }
    size_t from = at; /* bytes before it are surely data */
    for (;;) {
        const char *hit = at < t.n ? find_newline(pv__slice(t, at, t.n), newline) : NULL;
        if (hit == NULL) {
            break;
        }
        size_t begin = (size_t)(hit - t.p);
        at = begin + newline.n;
        if (after_dashes(r, pv__slice(t, at, t.n), PV__LIT(""), &rest)) {
            if (ends_boundary(rest)) {
                *data = pv__slice(t, 0, begin);
                r->at += begin;
                return 1;
            }
            at = t.n - rest.n;
            from = at;
            stop = pv__eq(rest, PV__LIT("-")) ? -1 : 0;
        }
    }
    /* no boundary; from its last line end on the tail may be the beginning of one */
    *data = t;
    ptrdiff_t tail = pv__last(pv__slice(t, from, t.n), newline.p[0]);
    if (tail >= 0) {
        size_t begin = from + (size_t)tail;
        pv_text end = pv__slice(t, begin, t.n);
        pv_text after = pv__slice(end, end.n < newline.n ? end.n : newline.n, end.n);
        if (memcmp(end.p, newline.p, end.n < newline.n ? end.n : newline.n) == 0 &&
            memcmp("--", after.n != 0 ? after.p : "", after.n < 2 ? after.n : 2) == 0 &&
            (after.n <= 2 || pv__starts(r->boundary, pv__slice(after, 2, after.n)))) {
            data->n = begin;
        }
    }
    r->at = r->body.n;
    return stop;
}

static int over_limit(struct reader *r, uint64_t limit) {
    static const pv_text before = {"file over the limited ", 22};
    char *p = pv__take(r->arena, before.n + 20 + 6);
    if (p == NULL) {
        return PV_EBUFFER;
    }
    struct pv__wr w = pv__writer(p, before.n + 20 + 6);
    pv__put_text(&w, before);
    pv__put_u64(&w, limit);
    PV__PUT(&w, " bytes");
    r->message = pv__text(p, w.n);
    return PV_EPARSE;
}

static int is_quoted(const struct part *part) {
    return pv__eq_nocase(part->transfer, PV__LIT("quoted-printable"));
}

/* Reads a part's data and checks it as far as the limit goes. */
static int take_data(struct reader *r, const struct part *part, uint64_t limit, pv_upload *out) {
    pv_text data;
    int whole = part_data(r, &data);
    size_t len = data.n;
    if (is_quoted(part)) {
        pv_text bad = pv__text(NULL, 0);
        enum qp_verdict v = qp_run(data, whole <= 0, NULL, limit < SIZE_MAX ? (size_t)limit + 1 : SIZE_MAX, &len, &bad);
        if (len <= limit) {
            switch (v) {
            case QP_OK:
                break;
            case QP_HEX:
            case QP_BYTE: {
                char *p = pv__take(r->arena, 64);
                if (p == NULL) {
                    return PV_EBUFFER;
                }
                struct pv__wr w = pv__writer(p, 64);
                pv__put_text(&w, v == QP_HEX ? PV__LIT("quotedprintable: invalid hex byte 0x")
                                             : PV__LIT("quotedprintable: invalid unescaped byte 0x"));
                pv__put_hex(&w, (unsigned char)bad.p[0], 2, pv__hex_lower);
                pv__put_text(&w, v == QP_HEX ? PV__LIT("") : PV__LIT(" in body"));
                r->message = pv__text(p, w.n);
                return PV_EPARSE;
            }
            case QP_AFTER:
                return refuse(r, PV__LIT("quotedprintable: invalid bytes after =: "), &bad);
            case QP_SHORT:
                return refuse(r, PV__LIT("unexpected EOF"), NULL);
            case QP_LONG:
                return refuse(r, PV__LIT("bufio: buffer full"), NULL);
            }
        }
    }
    if (len > limit && (whole >= 0 || is_quoted(part) || len - 1 > limit)) {
        return over_limit(r, limit);
    }
    if (whole <= 0) {
        return refuse(r, PV__LIT("unexpected EOF"), NULL);
    }
    out->data = (const uint8_t *)data.p;
    out->data_len = data.n;
    out->decoded_len = len;
    out->quoted = (uint8_t)is_quoted(part);
    return 0;
}

/* Base name of a part's filename; empty if it has none. 0 or PV_EBUFFER. */
static int part_name(struct reader *r, const struct part *part, pv_text *name) {
    struct pv__mt mt;
    pv_text ignored;
    *name = pv__text(NULL, 0);
    if (pv__mt_parse(part->disposition, &mt, &ignored) < 0) {
        return 0;
    }
    int rc = pv__mt_get(&mt, PV__LIT("filename"), r->arena, name);
    if (rc < 0) {
        return rc;
    }
    if (name->n != 0) {
        *name = base_name(base_name(*name, 0), 1);
    }
    return 0;
}

static int parse_multipart(const pv_upload_req *req, struct reader *r, pv_upload *out, struct part *chosen) {
    struct pv__mt mt;
    pv_text ignored;
    if (pv__mt_parse(req->content_type, &mt, &ignored) < 0 ||
        (!pv__mt_is(&mt, PV__LIT("multipart/form-data")) && !pv__mt_is(&mt, PV__LIT("multipart/mixed")))) {
        return refuse(r, PV__LIT("request Content-Type isn't multipart/form-data"), NULL);
    }
    int rc = pv__mt_get(&mt, PV__LIT("boundary"), r->arena, &r->boundary);
    if (rc == 0) {
        return refuse(r, PV__LIT("no multipart boundary param in Content-Type"), NULL);
    }
    if (rc < 0) {
        return rc;
    }
    rc = next_part(r, 1, chosen);
    if (rc < 0) {
        return rc;
    }
    rc = part_name(r, chosen, &out->name);
    if (rc < 0) {
        return rc;
    }
    rc = take_data(r, chosen, req->size_limit, out);
    if (rc < 0) {
        return rc;
    }
    while (out->name.n == 0) { /* ends: each round consumes a line at least */
        size_t mark = r->arena->n;
        struct part part;
        rc = next_part(r, 0, &part);
        if (rc == PV_EPARSE) {
            return 0; /* no more, or broken: the first part it is */
        }
        if (rc < 0) {
            return rc;
        }
        pv_text name;
        rc = part_name(r, &part, &name);
        if (rc < 0) {
            return rc;
        }
        if (name.n != 0) {
            rc = take_data(r, &part, req->size_limit, out);
            if (rc < 0) {
                return rc;
            }
            out->name = name;
            *chosen = part;
            return 0;
        }
        pv_text skipped;
        if (part_data(r, &skipped) <= 0) {
            return 0;
        }
        r->arena->n = mark;
    }
    return 0;
}

static int parse_raw(const pv_upload_req *req, struct reader *r, pv_upload *out) {
    if (pv__contains(req->content_disposition, PV__LIT("name="))) {
        static const pv_text prefix = {"attachment; ", 12};
        pv_text d = req->content_disposition;
        if (!pv__starts(d, PV__LIT("inline")) && !pv__starts(d, PV__LIT("attachment"))) {
            char *p = pv__take(r->arena, prefix.n + d.n);
            if (p == NULL) {
                return PV_EBUFFER;
            }
            memcpy(p, prefix.p, prefix.n);
            memcpy(p + prefix.n, d.p, d.n);
            d = pv__text(p, prefix.n + d.n);
        }
        struct pv__mt mt;
        pv_text ignored;
        if (pv__mt_parse(d, &mt, &ignored) == 0) {
            int rc = pv__mt_get(&mt, PV__LIT("filename"), r->arena, &out->name);
            if (rc == 0) {
                rc = pv__mt_get(&mt, PV__LIT("name"), r->arena, &out->name);
            }
            if (rc < 0) {
                return rc;
            }
        }
    }
    out->name = out->name.n != 0 ? base_name(out->name, 1) : base_name(req->path, 0);
    if (req->body_len > req->size_limit) {
        return over_limit(r, req->size_limit);
    }
    out->data = req->body;
    out->data_len = req->body_len;
    out->decoded_len = req->body_len;
    return 0;
}

int pv_upload_parse(const pv_upload_req *req, char *scratch, size_t cap, pv_upload *out, pv_errinfo *err) {
    memset(out, 0, sizeof *out);
    char none[1];
    struct pv__arena arena = {scratch != NULL ? scratch : none, scratch != NULL ? cap : 0, 0};
    struct reader r = {
        .body = pv__text((const char *)req->body, req->body_len),
        .arena = &arena,
    };
    struct part part;
    memset(&part, 0, sizeof part);
    pv_text type = req->content_type;
    out->is_multipart =
        pv__eq(req->method, PV__LIT("POST")) && (type.n == 0 || pv__contains(type, PV__LIT("form-data")));
    int rc = out->is_multipart ? parse_multipart(req, &r, out, &part) : parse_raw(req, &r, out);
    if (rc == PV_EBUFFER) {
        return pv__fail(err, PV_EBUFFER, cap < 4096 ? 8192 : 2 * cap, 0, 0, 0);
    }
    if (rc < 0) {
        out->message = r.message;
        return pv__fail(err, rc, 0, 0, 0, 0);
    }
    if (out->is_multipart) {
        type = part.type;
    } else {
        out->mime = type;
    }
    out->is_gzipped = (uint8_t)pv__eq(out->is_multipart ? part.encoding : req->content_encoding, PV__LIT("gzip"));
    out->md5 = req->content_md5.n != 0 ? req->content_md5 : part.md5;
    if (req->is_manifest) {
        return 0;
    }
    static const pv_text octets = {"application/octet-stream", 24};
    pv_text by_ext = pv__text(NULL, 0);
    ptrdiff_t dot = pv__last(out->name, '.');
    if (dot > 0 && req->mime != NULL) {
        (void)pv__mime_lookup_lower(req->mime, pv__slice(out->name, (size_t)dot, out->name.n), &by_ext);
    }
    if (type.n != 0 && !pv__eq(type, octets) && !pv__eq(type, by_ext)) {
        out->mime = type;
    } else if (by_ext.n != 0 && out->mime.n == 0 && !pv__eq(by_ext, octets)) {
        out->mime = by_ext;
    }
    return 0;
}

/* ------------------------------------------------------------------ compression (8.4) */

static int in_list(pv_text t, const char *const *list, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (pv__eq(t, pv__cstr(list[i]))) {
            return 1;
        }
    }
    return 0;
}

#define IN_LIST(t, list) in_list((t), (list), PV__ARRAY_LEN(list))

int pv_should_compress(pv_text name, pv_text mime, const uint8_t *data, size_t len) {
    static const char *const raw_media[] = {".svg", ".bmp", ".wav"};
    static const char *const packed[] = {".zip", ".rar", ".gz", ".bz2", ".xz", ".zst", ".br", ".png", ".jpg", ".jpeg"};
    static const char *const texts[] = {".pdf",  ".txt", ".html", ".htm", ".css", ".js", ".json", ".php",
                                        ".java", ".go",  ".rb",   ".c",   ".cpp", ".h",  ".hpp"};
    static const char *const waves[] = {"audio/wave", "audio/wav", "audio/x-wav", "audio/x-pn-wav"};
    pv_text ext = base_name(name, 0); /* upstream takes the whole name for the extension */
    if (mime.n == 0) {
        mime = pv__cstr(pv_sniff(data, len));
    }
    if (pv__eq(mime, PV__LIT("application/octet-stream"))) {
        mime = pv__text(NULL, 0);
    }
    if (pv__starts(mime, PV__LIT("text/")) || IN_LIST(ext, raw_media)) {
        return 1;
    }
    if (pv__starts(mime, PV__LIT("image/")) || IN_LIST(ext, packed)) {
        return 0;
    }
    if (IN_LIST(ext, texts)) {
        return 1;
    }
    if (pv__starts(mime, PV__LIT("application/"))) {
        return !pv__ends(mime, PV__LIT("zstd")) &&
               (pv__ends(mime, PV__LIT("xml")) || pv__ends(mime, PV__LIT("script")));
    }
    return IN_LIST(mime, waves);
}

/* ------------------------------------------------------------------ pairs (8.7, 6.5) */

#define PAIRS_MAX 65536
#define PAIR_PREFIX "seaweed-"
#define PAIR_PREFIX_LEN 8

/* Orders two headers by the canonical form of their names; the earlier one first if that is the same. */
static int pair_before(const pv_header *h, uint32_t a, uint32_t b, int *same) {
    pv_text x = h[a].name;
    pv_text y = h[b].name;
    int first = 1;
    for (size_t i = 0; i < x.n && i < y.n; i++) {
        unsigned char c = (unsigned char)x.p[i];
        unsigned char d = (unsigned char)y.p[i];
        c = first ? pv__upper(c) : pv__lower(c);
        d = first ? pv__upper(d) : pv__lower(d);
        if (c != d) {
            return c < d;
        }
        first = c == '-';
    }
    if (x.n != y.n) {
        return x.n < y.n;
    }
    *same = 1;
    return a < b;
}

/* Heap sort, largest at the root: no allocation, no bad case. */
static void pair_sift(const pv_header *h, uint32_t *order, size_t root, size_t count) {
    int same;
    for (;;) {
        size_t child = 2 * root + 1;
        if (child >= count) {
            return;
        }
        if (child + 1 < count && pair_before(h, order[child], order[child + 1], &same)) {
            child++;
        }
        if (!pair_before(h, order[root], order[child], &same)) {
            return;
        }
        uint32_t t = order[root];
        order[root] = order[child];
        order[child] = t;
        root = child;
    }
}

int pv_pairs_build(const pv_header *headers, size_t count, uint32_t *order, char *buf, size_t cap, size_t *len) {
    size_t n = 0;
    *len = 0;
    for (size_t i = 0; i < count && i < UINT32_MAX; i++) {
        pv_text name = headers[i].name;
        int ok = name.n >= PAIR_PREFIX_LEN &&
                 pv__eq_nocase(pv__slice(name, 0, PAIR_PREFIX_LEN), pv__text(PAIR_PREFIX, PAIR_PREFIX_LEN));
        for (size_t k = PAIR_PREFIX_LEN; ok && k < name.n; k++) {
            ok = pv__is_field((unsigned char)name.p[k]); /* others never get past a server's head parser */
        }
        if (ok) {
            order[n++] = (uint32_t)i;
        }
    }
    if (n == 0) {
        return 0;
    }
    for (size_t i = n / 2; i-- > 0;) {
        pair_sift(headers, order, i, n);
    }
    for (size_t end = n - 1; end > 0; end--) {
        uint32_t t = order[0];
        order[0] = order[end];
        order[end] = t;
        pair_sift(headers, order, 0, end);
    }
    struct pv__wr w = pv__writer(buf, cap);
    pv__put_char(&w, '{');
    for (size_t i = 0; i < n && w.n < PAIRS_MAX; i++) {
        int same = 0;
        if (i > 0) {
            (void)pair_before(headers, order[i - 1], order[i], &same);
            if (same) {
                continue; /* the first header of a name counts */
            }
            pv__put_char(&w, ',');
        }
        pv_text name = pv__slice(headers[order[i]].name, PAIR_PREFIX_LEN, headers[order[i]].name.n);
        pv__put_char(&w, '"');
        int first = 1;
        for (size_t k = 0; k < name.n; k++) {
            unsigned char c = (unsigned char)name.p[k];
            char shown = (char)(first ? pv__upper(c) : pv__lower(c));
            first = c == '-';
            /* of a header name's bytes only & has a long form in JSON */
            if (shown == '&') {
                PV__PUT(&w, "\\u0026");
            } else {
                pv__put_char(&w, shown);
            }
        }
        PV__PUT(&w, "\":");
        pv__put_json(&w, headers[order[i]].value);
    }
    pv__put_char(&w, '}');
    if (w.n >= PAIRS_MAX) {
        return 0;
    }
    if (w.n > cap) {
        return PV_EBUFFER;
    }
    *len = w.n;
    return 1;
}

static pv_text decode_into(struct pv__wr *w, pv_text raw) {
    struct pv__chars c = pv__chars(raw, 1);
    size_t from = w->n;
    int b;
    while ((b = pv__chars_next(&c)) >= 0) {
        pv__put_char(w, (char)b);
    }
    return w->n <= w->cap ? pv__text(w->p + from, w->n - from) : pv__text(NULL, 0);
}

int pv_pairs_parse(const char *json, size_t n, char *buf, size_t cap, pv_header *pairs, size_t max, size_t *count,
                   pv_errinfo *err) {
    pv_text j = pv__text(json, n);
    size_t at = 0;
    *count = 0;
    if (pv__json_object(j, &at) != 0) {
        return pv__fail(err, PV_EPARSE, 0, at, 0, 0);
    }
    struct pv__wr w = pv__writer(buf, cap);
    pv_text name;
    pv_text value;
    at = 0;
    while (pv__json_member(j, &at, &name, &value)) {
        if (*count < max) {
            pairs[*count].name = decode_into(&w, name);
            pairs[*count].value = decode_into(&w, value);
        }
        ++*count;
    }
    return w.n > cap ? pv__fail(err, PV_EBUFFER, w.n, 0, 0, 0) : 0;
}

/* ------------------------------------------------------------------ ttl (8.6) */

enum { TTL_MINUTE = 1, TTL_HOUR, TTL_DAY, TTL_WEEK, TTL_MONTH, TTL_YEAR };

int pv_ttl_parse(const char *p, size_t n, uint8_t *count, uint8_t *unit) {
    static const uint64_t seconds_of[] = {
        [TTL_MINUTE] = 60,      [TTL_HOUR] = 3600,        [TTL_DAY] = 86400,
        [TTL_WEEK] = 7 * 86400, [TTL_MONTH] = 30 * 86400, [TTL_YEAR] = 365 * 86400,
    };
    static const char letters[] = "mhdwMy";
    *count = 0;
    *unit = 0;
    if (n == 0) {
        return 0;
    }
    char letter = 'm';
    if (!pv__is_digit((unsigned char)p[n - 1])) {
        letter = p[--n];
    }
    const char *hit = letter != '\0' ? strchr(letters, letter) : NULL;
    int64_t value;
    (void)pv__int(pv__text(p, n), &value); /* upstream goes on with what its parser gives on errors: 0 or a limit */
    uint64_t seconds = hit != NULL ? (uint64_t)value * seconds_of[hit - letters + 1] : 0;
    if (seconds == 0) {
        return 0;
    }
    for (int u = TTL_YEAR; u >= TTL_HOUR; u--) { /* the largest unit that divides */
        if (seconds % seconds_of[u] == 0 && seconds / seconds_of[u] < 256) {
            *count = (uint8_t)(seconds / seconds_of[u]);
            *unit = (uint8_t)u;
            return 1;
        }
    }
    for (int u = TTL_MINUTE; u <= TTL_YEAR; u++) { /* else the smallest that is fine enough, cut */
        if (seconds / seconds_of[u] < 256) {
            *count = (uint8_t)(seconds / seconds_of[u]);
            *unit = (uint8_t)u;
            return 1;
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ reply (8.8) */

static void put_member(struct pv__wr *w, const char *name, pv_text value) {
    if (value.n != 0) {
        pv__put_text(w, w->n == 1 ? PV__LIT("\"") : PV__LIT(",\""));
        pv__put_text(w, pv__cstr(name));
        PV__PUT(w, "\":");
        pv__put_json(w, value);
    }
}

size_t pv_write_reply(pv_text name, uint32_t size, uint32_t checksum, pv_text mime, pv_text md5, char *buf,
                      size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    char tag[10];
    (void)pv_etag(checksum, tag, sizeof tag);
    pv__put_char(&w, '{');
    put_member(&w, "name", name);
    if (size != 0) {
        pv__put_text(&w, w.n == 1 ? PV__LIT("\"size\":") : PV__LIT(",\"size\":"));
        pv__put_u64(&w, size);
    }
    put_member(&w, "eTag", pv__text(tag + 1, sizeof tag - 2));
    put_member(&w, "mime", mime);
    put_member(&w, "contentMd5", md5);
    pv__put_char(&w, '}');
    return w.n;
}
