/* pv_http.c - what a request for a needle means: path, file id, range, conditions, and the whole answer to a read.
 * Pure functions on the caller's buffers. Uploads are in pv_http_upload.c, texts and media types in pv_http_text.c.
 */
#include "pv_http_int.h"

/* ------------------------------------------------------------------ paths (4) */

static int is_path_char(unsigned char c) {
    /* what may stand unescaped in a path; other bytes make Go escape the path anew */
    return pv__in(PV__DIGITS | PV__BIT('!') | PV__BIT('$') | PV__BIT('&') | PV__BIT('\'') | PV__BIT('(') |
                      PV__BIT(')') | PV__BIT('*') | PV__BIT('+') | PV__BIT(',') | PV__BIT(';') | PV__BIT('=') |
                      PV__BIT(':') | PV__BIT('-') | PV__BIT('.') | PV__BIT('/') | PV__BIT('%'),
                  PV__LETTERS | PV__BIT('@') | PV__BIT('[') | PV__BIT(']') | PV__BIT('_') | PV__BIT('~'), c);
}

/* Whether an element between slashes is empty (but for the last), "." or "..". */
static int is_unclean(pv_text path) {
    size_t begin = 1; /* of an element */
    for (size_t i = 1; i <= path.n; i++) {
        if (i < path.n && path.p[i] != '/') {
            continue;
        }
        size_t len = i - begin;
        if ((len == 0 && i < path.n) || (len == 1 && path.p[begin] == '.') ||
            (len == 2 && path.p[begin] == '.' && path.p[begin + 1] == '.')) {
            return 1;
        }
        begin = i + 1;
    }
    return path.n == 0 || path.p[0] != '/';
}

static void split_path(pv_text path, pv_url *out) {
    size_t slashes = 0;
    size_t at[4] = {0}; /* of the first four slashes */
    for (size_t i = 0; i < path.n; i++) {
        if (path.p[i] == '/') {
            if (slashes < PV__ARRAY_LEN(at)) {
                at[slashes] = i;
            }
            slashes++;
        }
    }
    if (slashes == 3) {
        out->vid = pv__slice(path, at[0] + 1, at[1]);
        out->fid = pv__slice(path, at[1] + 1, at[2]);
        out->filename = pv__slice(path, at[2] + 1, path.n);
        pv_name_ext(out->filename.p, out->filename.n, &out->ext);
        return;
    }
    if (slashes == 2) {
        out->vid = pv__slice(path, at[0] + 1, at[1]);
        out->fid = pv__slice(path, at[1] + 1, path.n);
        ptrdiff_t dot = pv__last(out->fid, '.');
        if (dot > 0) {
            out->ext = pv__slice(out->fid, (size_t)dot, out->fid.n);
            out->fid.n = (size_t)dot;
        }
        return;
    }
    if (slashes == 0) { /* Go dies */
        out->kind = PV_URL_BAD;
        return;
    }
    size_t begin = (size_t)pv__last(path, '/') + 1;
    pv_text segment = pv__slice(path, begin, path.n);
    ptrdiff_t comma = pv__last(segment, ',');
    if (comma < 0) {
        out->kind = PV_URL_VID_ONLY;
        out->vid = segment;
        return;
    }
    if (slashes != 1) { /* Go applies offsets within the segment to the path */
        out->kind = PV_URL_BAD;
        out->vid = segment;
        return;
    }
    ptrdiff_t dot = pv__last(segment, '.');
    out->vid = pv__slice(segment, 0, (size_t)comma);
    if (dot >= 0 && dot < comma) {
        out->kind = PV_URL_DROP;
        return;
    }
    out->fid = pv__slice(segment, (size_t)comma + 1, segment.n);
    if (dot >= 0) {
        out->fid.n = (size_t)(dot - comma - 1);
        out->ext = pv__slice(segment, (size_t)dot, segment.n);
    }
}

int pv_url_parse(const char *raw, size_t raw_len, char *buf, size_t cap, pv_url *out, pv_errinfo *err) {
    memset(out, 0, sizeof *out);
    out->path = pv__text(raw, raw_len);
    int plain = 1;
    int escaped = 0;
    for (size_t i = 0; i < raw_len; i++) {
        plain &= is_path_char((unsigned char)raw[i]);
        escaped |= raw[i] == '%';
    }
    if (escaped) {
        if (cap < raw_len) {
            return pv__fail(err, PV_EBUFFER, raw_len, 0, 0, 0);
        }
        size_t n = 0;
        for (size_t i = 0; i < raw_len; i++) {
            char c = raw[i];
            if (c == '%') {
                if (raw_len - i < 3 || pv__hex((unsigned char)raw[i + 1]) < 0 ||
                    pv__hex((unsigned char)raw[i + 2]) < 0) {
                    return pv__fail(err, PV_EPARSE, 0, i, 0, 0);
                }
                c = (char)(pv__hex((unsigned char)raw[i + 1]) << 4 | pv__hex((unsigned char)raw[i + 2]));
                i += 2;
            }
            buf[n++] = c;
        }
        out->path = pv__text(buf, n);
    }
    out->unclean = is_unclean(plain ? pv__text(raw, raw_len) : out->path);
    split_path(out->path, out);
    out->claim_fid = out->fid;
    ptrdiff_t delta = pv__last(out->fid, '_');
    if (delta > 0) {
        out->claim_fid.n = (size_t)delta;
    }
    return 0;
}

void pv_url_write_fid(const char *path, size_t n, pv_text *fid) {
    pv_text t = pv__text(path, n);
    ptrdiff_t comma = pv__last(t, ',');
    ptrdiff_t dot = pv__last(t, '.');
    size_t from = (size_t)(comma + 1);
    *fid = pv__slice(t, from, dot > comma ? (size_t)dot : n);
}

/* ------------------------------------------------------------------ ids (4) */

#define COOKIE_DIGITS 8
#define KEY_DIGITS 16

static int id_fail(pv_id_error *e, enum pv_id_code code, pv_text text, uint64_t key, uint64_t delta) {
    if (e != NULL) {
        memset(e, 0, sizeof *e);
        e->code = (int32_t)code;
        e->text = text;
        e->key = key;
        e->delta = delta;
    }
    return PV_EPARSE;
}

int pv_vid_parse(const char *p, size_t n, uint32_t *vid, pv_id_error *e) {
    pv_text t = pv__text(p, n);
    uint64_t v;
    *vid = 0;
    enum pv__num rc = pv__uint(t, 10, &v);
    if (rc == PV__NUM_SYNTAX) {
        return id_fail(e, PV_ID_VID_SYNTAX, t, 0, 0);
    }
    if (v > UINT32_MAX) {
        return id_fail(e, PV_ID_VID_RANGE, t, 0, 0);
    }
    *vid = (uint32_t)v;
    return 0;
}

int pv_fid_parse(const char *p, size_t n, uint64_t *key, uint32_t *cookie, pv_id_error *e) {
    pv_text t = pv__text(p, n);
    pv_text delta = pv__text(NULL, 0);
    *key = 0;
    *cookie = 0;
    if (t.n <= COOKIE_DIGITS) {
        return id_fail(e, PV_ID_FID_INVALID, t, 0, 0);
    }
    ptrdiff_t mark = pv__last(t, '_');
    if (mark > 0) {
        delta = pv__slice(t, (size_t)mark + 1, t.n);
        t.n = (size_t)mark;
    }
    if (t.n <= COOKIE_DIGITS) {
        return id_fail(e, PV_ID_SHORT, t, 0, 0);
    }
    if (t.n > KEY_DIGITS + COOKIE_DIGITS) {
        return id_fail(e, PV_ID_LONG, t, 0, 0);
    }
    pv_text key_text = pv__slice(t, 0, t.n - COOKIE_DIGITS);
    pv_text cookie_text = pv__slice(t, t.n - COOKIE_DIGITS, t.n);
    uint64_t k;
    uint64_t c;
    uint64_t d = 0;
    if (pv__uint(key_text, 16, &k) != PV__NUM_OK) {
        return id_fail(e, PV_ID_KEY, key_text, 0, 0);
    }
    if (pv__uint(cookie_text, 16, &c) != PV__NUM_OK) {
        return id_fail(e, PV_ID_COOKIE, cookie_text, 0, 0);
    }
    if (delta.n != 0) {
        enum pv__num rc = pv__uint(delta, 10, &d);
        if (rc != PV__NUM_OK) {
            return id_fail(e, rc == PV__NUM_RANGE ? PV_ID_DELTA_RANGE : PV_ID_DELTA_SYNTAX, delta, k, 0);
        }
        if (d > UINT64_MAX - k) {
            return id_fail(e, PV_ID_DELTA_OVERFLOW, delta, k, d);
        }
    }
    *key = k + d;
    *cookie = (uint32_t)c;
    return 0;
}

/* Text of Go's number parser. */
static void put_num_error(struct pv__wr *w, pv_text t, int range) {
    PV__PUT(w, "strconv.ParseUint: parsing ");
    pv__put_quote(w, t);
    if (range) {
        PV__PUT(w, ": value out of range");
    } else {
        PV__PUT(w, ": invalid syntax");
    }
}

size_t pv_fid_error_text(const pv_id_error *e, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    char hex[KEY_DIGITS];
    struct pv__wr h = pv__writer(hex, sizeof hex);
    switch ((enum pv_id_code)e->code) {
    case PV_ID_OK:
        break;
    case PV_ID_VID_SYNTAX:
    case PV_ID_DELTA_SYNTAX:
        put_num_error(&w, e->text, 0);
        break;
    case PV_ID_VID_RANGE:
    case PV_ID_DELTA_RANGE:
        put_num_error(&w, e->text, 1);
        break;
    case PV_ID_FID_INVALID:
        PV__PUT(&w, "Invalid fid: ");
        pv__put_text(&w, e->text);
        break;
    case PV_ID_SHORT:
        PV__PUT(&w, "KeyHash is too short.");
        break;
    case PV_ID_LONG:
        PV__PUT(&w, "KeyHash is too long.");
        break;
    case PV_ID_KEY:
        PV__PUT(&w, "Parse needleId error: needle id ");
        pv__put_text(&w, e->text);
        PV__PUT(&w, " format error: ");
        put_num_error(&w, e->text, 0);
        break;
    case PV_ID_COOKIE:
        PV__PUT(&w, "Parse cookie error: needle cookie ");
        pv__put_text(&w, e->text);
        PV__PUT(&w, " format error: ");
        put_num_error(&w, e->text, 0);
        break;
    case PV_ID_DELTA_OVERFLOW:
        PV__PUT(&w, "delta ");
        pv__put_u64(&w, e->delta);
        PV__PUT(&w, " overflows needle id ");
        pv__put_hex(&h, e->key, 1, pv__hex_lower);
        for (size_t i = 0; i < h.n; i++) { /* needle.go prints the hex text in hex */
            pv__put_hex(&w, (unsigned char)hex[i], 2, pv__hex_lower);
        }
        break;
    }
    return w.n;
}

/* ------------------------------------------------------------------ ranges (6.8) */

struct range_iter {
    pv_text rest;
    int64_t total;
};

/* 1 and the next range, 0 at the end, -1 where one is invalid. Arithmetic wraps as Go's. */
static int range_next(struct range_iter *it, pv_range *r) {
    while (it->rest.n != 0) {
        const char *comma = memchr(it->rest.p, ',', it->rest.n);
        size_t len = comma != NULL ? (size_t)(comma - it->rest.p) : it->rest.n;
        pv_text item = pv__trim(pv__slice(it->rest, 0, len));
        size_t skip = comma != NULL ? len + 1 : len;
        it->rest = pv__slice(it->rest, skip, it->rest.n);
        if (item.n == 0) {
            continue;
        }
        const char *dash = memchr(item.p, '-', item.n);
        if (dash == NULL) {
            return -1;
        }
        size_t at = (size_t)(dash - item.p);
        pv_text first = pv__trim(pv__slice(item, 0, at));
        pv_text last = pv__trim(pv__slice(item, at + 1, item.n));
        int64_t a;
        int64_t b;
        if (first.n == 0) {
            if (pv__int(last, &b) != PV__NUM_OK) {
                return -1;
            }
            r->length = b > it->total ? it->total : b;
            r->start = (int64_t)((uint64_t)it->total - (uint64_t)r->length);
            return 1;
        }
        if (pv__int(first, &a) != PV__NUM_OK || a > it->total || a < 0) {
            return -1;
        }
        r->start = a;
        if (last.n == 0) {
            r->length = it->total - a;
            return 1;
        }
        if (pv__int(last, &b) != PV__NUM_OK || a > b) {
            return -1;
        }
        r->length = (b >= it->total ? it->total - 1 : b) - a + 1;
        return 1;
    }
    return 0;
}

static int range_begin(pv_text header, uint64_t total, struct range_iter *it) {
    static const pv_text unit = {"bytes=", 6};
    if (!pv__starts(header, unit)) {
        return 0;
    }
    it->rest = pv__slice(header, unit.n, header.n);
    it->total = (int64_t)total;
    return 1;
}

int pv_range_parse(const char *p, size_t n, uint64_t total, pv_range *ranges, size_t max, size_t *count) {
    struct range_iter it;
    *count = 0;
    if (n == 0) {
        return PV_RANGE_NONE;
    }
    if (total > INT64_MAX || !range_begin(pv__text(p, n), total, &it)) {
        return PV_RANGE_INVALID;
    }
    size_t found = 0;
    int64_t sum = 0;
    int outside = 0;
    pv_range r;
    int rc;
    while ((rc = range_next(&it, &r)) > 0) {
        if (found < max) {
            ranges[found] = r;
        }
        found++;
        sum = (int64_t)((uint64_t)sum + (uint64_t)r.length);
        outside |= r.length < 0; /* Go looks for a start behind the end, which that has unless the sum wraps */
    }
    if (rc < 0) {
        return PV_RANGE_INVALID;
    }
    if (sum > (int64_t)total || found == 0) {
        return PV_RANGE_EMPTY;
    }
    if (found > 1 && outside) {
        return PV_RANGE_OUTSIDE;
    }
    *count = found;
    return found == 1 ? PV_RANGE_SINGLE : PV_RANGE_MULTI;
}

static void put_content_range(struct pv__wr *w, const pv_range *r, uint64_t total) {
    PV__PUT(w, "bytes ");
    pv__put_i64(w, r->start);
    pv__put_char(w, '-');
    pv__put_i64(w, (int64_t)((uint64_t)r->start + (uint64_t)r->length - 1));
    pv__put_char(w, '/');
    pv__put_u64(w, total);
}

size_t pv_content_range(const pv_range *r, uint64_t total, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    put_content_range(&w, r, total);
    return w.n;
}

/* ------------------------------------------------------------------ dates (6.3) */

static const char month_names[12][4] = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                        "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
static const char day_names[7][4] = {"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"};

#define DAY_S 86400
#define ERA_DAYS 146097   /* 400 years */
#define EPOCH_DAYS 719468 /* from 0000-03-01 to 1970-01-01 */

/* Days since 1970 of a date in the proleptic Gregorian calendar; years count from March. */
static int64_t days_of(int64_t year, int month, int day) {
    year -= month <= 2;
    int64_t era = (year >= 0 ? year : year - 399) / 400;
    int64_t year_of_era = year - era * 400;
    int64_t day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
    return era * ERA_DAYS + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH_DAYS;
}

static void put_2(struct pv__wr *w, int64_t v) {
    pv__put_char(w, (char)('0' + v / 10));
    pv__put_char(w, (char)('0' + v % 10));
}

size_t pv_http_date(int64_t unix_s, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    int64_t days = unix_s / DAY_S - (unix_s % DAY_S < 0);
    int64_t s = unix_s - days * DAY_S;
    int64_t weekday = (days % 7 + 7 + 4) % 7; /* 1970 began on a Thursday */
    int64_t z = days + EPOCH_DAYS;
    int64_t era = (z >= 0 ? z : z - (ERA_DAYS - 1)) / ERA_DAYS;
    int64_t doe = z - era * ERA_DAYS;
    int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / (ERA_DAYS - 1)) / 365;
    int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    int64_t mp = (5 * doy + 2) / 153;
    int64_t day = doy - (153 * mp + 2) / 5 + 1;
    int64_t month = mp < 10 ? mp + 3 : mp - 9;
    int64_t year = yoe + era * 400 + (month <= 2);
    pv__put(&w, day_names[weekday], 3);
    PV__PUT(&w, ", ");
    put_2(&w, day);
    pv__put_char(&w, ' ');
    pv__put(&w, month_names[month - 1], 3);
    pv__put_char(&w, ' ');
    if (year < 0) {
        pv__put_char(&w, '-');
        year = -year;
    }
    for (int64_t limit = 1000; limit > 1 && year < limit; limit /= 10) {
        pv__put_char(&w, '0');
    }
    pv__put_i64(&w, year);
    pv__put_char(&w, ' ');
    put_2(&w, s / 3600);
    pv__put_char(&w, ':');
    put_2(&w, s / 60 % 60);
    pv__put_char(&w, ':');
    put_2(&w, s % 60);
    PV__PUT(&w, " GMT");
    return w.n;
}

/* Parts of Go's time.Parse; each takes its piece from the head of *t and says whether it was there. */

/* A layout's literal: a blank in it stands for any number of blanks, none only at the end of the text. */
static int date_literal(pv_text *t, const char *literal) {
    for (; *literal != '\0'; literal++) {
        if (*literal == ' ') {
            if (t->n != 0 && t->p[0] != ' ') {
                return 0;
            }
            while (t->n != 0 && t->p[0] == ' ') {
                *t = pv__slice(*t, 1, t->n);
            }
        } else if (t->n == 0 || t->p[0] != *literal) {
            return 0;
        } else {
            *t = pv__slice(*t, 1, t->n);
        }
    }
    return 1;
}

/* Index of a three-letter name, or -1. */
static int date_name(pv_text *t, const char names[][4], int count) {
    for (int i = 0; i < count && t->n >= 3; i++) {
        if (pv__eq_nocase(pv__slice(*t, 0, 3), pv__text(names[i], 3))) {
            *t = pv__slice(*t, 3, t->n);
            return i;
        }
    }
    return -1;
}

/* Number of min to max digits, or -1. */
static int date_number(pv_text *t, size_t min, size_t max) {
    size_t n = 0;
    int v = 0;
    while (n < max && n < t->n && pv__is_digit((unsigned char)t->p[n])) {
        v = v * 10 + (t->p[n] - '0');
        n++;
    }
    if (n < min) {
        return -1;
    }
    *t = pv__slice(*t, n, t->n);
    return v;
}

static int month_days(int month, int year) {
    static const int days[12] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
    int leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    return days[month - 1] + (month == 2 && leap);
}

int pv_http_date_parse(const char *p, size_t n, int64_t *unix_s) {
    pv_text t = pv__text(p, n);
    *unix_s = 0;
    if (date_name(&t, day_names, 7) < 0 || !date_literal(&t, ", ")) {
        return PV_EPARSE;
    }
    int day = date_number(&t, 2, 2);
    if (day < 0 || !date_literal(&t, " ")) {
        return PV_EPARSE;
    }
    int month = date_name(&t, month_names, 12) + 1;
    if (month == 0 || !date_literal(&t, " ")) {
        return PV_EPARSE;
    }
    int year = date_number(&t, 4, 4);
    if (year < 0 || !date_literal(&t, " ")) {
        return PV_EPARSE;
    }
    int hour = date_number(&t, 1, 2);
    if (hour < 0 || hour > 23 || !date_literal(&t, ":")) {
        return PV_EPARSE;
    }
    int minute = date_number(&t, 2, 2);
    if (minute < 0 || minute > 59 || !date_literal(&t, ":")) {
        return PV_EPARSE;
    }
    int second = date_number(&t, 2, 2);
    if (second < 0 || second > 59) {
        return PV_EPARSE;
    }
    if (t.n >= 2 && (t.p[0] == '.' || t.p[0] == ',') && pv__is_digit((unsigned char)t.p[1])) {
        size_t i = 1; /* a fraction, which Go accepts though the form has none */
        while (i < t.n && pv__is_digit((unsigned char)t.p[i])) {
            i++;
        }
        t = pv__slice(t, i, t.n);
    }
    if (!date_literal(&t, " GMT") || t.n != 0 || day < 1 || day > month_days(month, year)) {
        return PV_EPARSE;
    }
    *unix_s = days_of(year, month, day) * DAY_S + hour * 3600 + minute * 60 + second;
    return 0;
}

/* ------------------------------------------------------------------ entity tags, conditions (6.3) */

#define ETAG_LEN 10

static void put_etag(struct pv__wr *w, uint32_t checksum) {
    pv__put_char(w, '"');
    pv__put_hex(w, checksum, 8, pv__hex_lower);
    pv__put_char(w, '"');
}

size_t pv_etag(uint32_t checksum, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    put_etag(&w, checksum);
    return w.n;
}

int pv_cond_eval(pv_text if_modified_since, pv_text if_none_match, uint64_t last_modified_s, uint32_t checksum) {
    int64_t since;
    if (last_modified_s != 0 && if_modified_since.n != 0 &&
        pv_http_date_parse(if_modified_since.p, if_modified_since.n, &since) == 0 &&
        since >= (int64_t)last_modified_s) {
        return 1;
    }
    char tag[ETAG_LEN];
    size_t len = pv_etag(checksum, tag, sizeof tag);
    return pv__same(tag, len, if_none_match);
}

/* ------------------------------------------------------------------ Content-Disposition (13.1) */

static void put_disposition(struct pv__wr *w, int attachment, pv_text name) {
    if (attachment) {
        PV__PUT(w, "attachment; filename");
    } else {
        PV__PUT(w, "inline; filename");
    }
    int token = name.n != 0;
    int encode = 0;
    for (size_t i = 0; i < name.n; i++) {
        unsigned char c = (unsigned char)name.p[i];
        token &= pv__is_token(c);
        encode |= (c < ' ' || c > '~') && c != '\t';
    }
    if (encode) {
        PV__PUT(w, "*=utf-8''");
    } else if (token) {
        PV__PUT(w, "=");
    } else {
        PV__PUT(w, "=\"");
    }
    for (size_t i = 0; i < name.n; i++) {
        unsigned char c = (unsigned char)name.p[i];
        if (encode && (c == '*' || c == '\'' || c == '%' || !pv__is_token(c))) {
            pv__put_char(w, '%');
            pv__put_hex(w, c, 2, pv__hex_upper);
            continue;
        }
        if (!encode && (c == '"' || c == '\\')) {
            pv__put_char(w, '\\');
        }
        pv__put_char(w, (char)c);
    }
    if (!encode && !token) {
        pv__put_char(w, '"');
    }
}

size_t pv_content_disposition(int attachment, const char *name, size_t n, char *buf, size_t cap) {
    struct pv__wr w = pv__writer(buf, cap);
    put_disposition(&w, attachment, pv__text(name, n));
    return w.n;
}

/* ------------------------------------------------------------------ the answer to a read (6.3-6.8) */

/* Headers that the handler or the HTTP library treats by name. Stored pairs may set them, too. */
enum slot_id {
    H_LAST_MODIFIED,
    H_ETAG,
    H_CONTENT_TYPE,
    H_CONTENT_DISPOSITION,
    H_CONTENT_ENCODING,
    H_CONTENT_LANGUAGE,
    H_CONTENT_RANGE,
    H_CACHE_CONTROL,
    H_EXPIRES,
    H_ACCEPT_RANGES,
    H_FILE_STORE,
    H_NOSNIFF,
    H_CONTENT_LENGTH,
    H_SERVER,
    H_DATE,
    H_REQUEST_ID,
    H_ALLOW_ORIGIN,
    H_ALLOW_CREDENTIALS,
    H_CONNECTION,
    H_TRANSFER_ENCODING,
    H_COUNT
};

static const pv_text slot_names[] = {
    [H_LAST_MODIFIED] = {"Last-Modified", 13},
    [H_ETAG] = {"Etag", 4},
    [H_CONTENT_TYPE] = {"Content-Type", 12},
    [H_CONTENT_DISPOSITION] = {"Content-Disposition", 19},
    [H_CONTENT_ENCODING] = {"Content-Encoding", 16},
    [H_CONTENT_LANGUAGE] = {"Content-Language", 16},
    [H_CONTENT_RANGE] = {"Content-Range", 13},
    [H_CACHE_CONTROL] = {"Cache-Control", 13},
    [H_EXPIRES] = {"Expires", 7},
    [H_ACCEPT_RANGES] = {"Accept-Ranges", 13},
    [H_FILE_STORE] = {"X-File-Store", 12},
    [H_NOSNIFF] = {"X-Content-Type-Options", 22},
    [H_CONTENT_LENGTH] = {"Content-Length", 14},
    [H_SERVER] = {"Server", 6},
    [H_DATE] = {"Date", 4},
    [H_REQUEST_ID] = {"X-Amz-Request-Id", 16},
    [H_ALLOW_ORIGIN] = {"Access-Control-Allow-Origin", 27},
    [H_ALLOW_CREDENTIALS] = {"Access-Control-Allow-Credentials", 32},
    [H_CONNECTION] = {"Connection", 10},
    [H_TRANSFER_ENCODING] = {"Transfer-Encoding", 17},
};
_Static_assert(PV__ARRAY_LEN(slot_names) == H_COUNT, "a name per header");

static const uint32_t slot_flags[] = {
    [H_SERVER] = PV_PLAN_HAS_SERVER,
    [H_DATE] = PV_PLAN_HAS_DATE,
    [H_REQUEST_ID] = PV_PLAN_HAS_REQUEST_ID,
    [H_ALLOW_ORIGIN] = PV_PLAN_HAS_ALLOW_ORIGIN,
    [H_ALLOW_CREDENTIALS] = PV_PLAN_HAS_ALLOW_CREDENTIALS,
    [H_CONNECTION] = PV_PLAN_HAS_CONNECTION,
    [H_TRANSFER_ENCODING] = 0,
};
_Static_assert(PV__ARRAY_LEN(slot_flags) == H_COUNT, "flags per header");

static const unsigned char override_slots[6] = {
    [PV_OVR_CACHE_CONTROL] = H_CACHE_CONTROL,       [PV_OVR_CONTENT_DISPOSITION] = H_CONTENT_DISPOSITION,
    [PV_OVR_CONTENT_ENCODING] = H_CONTENT_ENCODING, [PV_OVR_CONTENT_LANGUAGE] = H_CONTENT_LANGUAGE,
    [PV_OVR_CONTENT_TYPE] = H_CONTENT_TYPE,         [PV_OVR_EXPIRES] = H_EXPIRES,
};

#define SLOT_NAME_MAX 32
#define BOUNDARY_LEN 60
#define SMALL_BODY 2048 /* the HTTP library's buffer: a body that fits gets a Content-Length */
#define SNIFF_LEN 512

struct slot {
    pv_text value;
    uint8_t set;
    uint8_t json;        /* value is a JSON string between its quotes */
    uint8_t disposition; /* value is a file name to be formatted */
};

struct planner {
    const pv_get_req *req;
    const pv_get_needle *n;
    struct slot slots[H_COUNT];
    pv_text file; /* name the client sees */
    pv_text mime; /* Content-Type the handler finds, empty if none */
    char last_modified[40];
    char etag[ETAG_LEN];
    char length[20];
    char range[64];
    char boundary_type[32 + BOUNDARY_LEN];
};

static void set_slot(struct planner *pl, enum slot_id id, pv_text value) {
    pl->slots[id] = (struct slot){value, 1, 0, 0};
}

/* A pair's name in canonical case: its length if it is a valid header name (stored up to cap bytes), else 0. */
static size_t pair_name(pv_text raw, char *buf, size_t cap, uint32_t *hash) {
    struct pv__chars c = pv__chars(raw, 1);
    size_t n = 0;
    int first = 1;
    int b;
    *hash = 2166136261U;
    while ((b = pv__chars_next(&c)) >= 0) {
        if (!pv__is_field((unsigned char)b)) {
            return 0;
        }
        unsigned char u = first ? pv__upper((unsigned char)b) : pv__lower((unsigned char)b);
        first = u == '-';
        if (n < cap) {
            buf[n] = (char)u;
        }
        *hash = (*hash ^ u) * 16777619U;
        n++;
    }
    return n;
}

static int slot_of(const char *name, size_t n) {
    for (int i = 0; n <= SLOT_NAME_MAX && i < H_COUNT; i++) {
        if (pv__same(name, n, slot_names[i])) {
            return i;
        }
    }
    return -1;
}

/* A header value as Go writes it: line breaks become blanks, blanks around it go. */
static void put_value(struct pv__wr *w, pv_text value, int json) {
    struct pv__chars c = pv__chars(value, json);
    size_t end = w->n;
    int begun = 0;
    int b;
    while ((b = pv__chars_next(&c)) >= 0) {
        int blank = b == ' ' || b == '\t' || b == '\n' || b == '\r';
        if (blank && !begun) {
            continue;
        }
        begun = 1;
        pv__put_char(w, b == '\n' || b == '\r' ? ' ' : (char)b);
        if (!blank) {
            end = w->n;
        }
    }
    w->n = end;
}

static void put_header(struct pv__wr *w, pv_text name, const struct slot *s) {
    pv__put_text(w, name);
    PV__PUT(w, ": ");
    if (s->disposition) {
        put_disposition(w, s->disposition == 2, s->value);
    } else {
        put_value(w, s->value, s->json);
    }
    PV__PUT(w, "\r\n");
}

/* Drops an earlier line of this name from buf[0, w->n). Nothing to do once the buffer has overflowed. */
static void drop_line(struct pv__wr *w, pv_text name) {
    size_t at = 0;
    while (w->n <= w->cap && at < w->n) {
        const char *end = memchr(w->p + at, '\n', w->n - at);
        size_t len = (size_t)(end - (w->p + at)) + 1;
        if (len > name.n + 1 && memcmp(w->p + at, name.p, name.n) == 0 && w->p[at + name.n] == ':') {
            memmove(w->p + at, w->p + at + len, w->n - at - len);
            w->n -= len;
            return;
        }
        at += len;
    }
}

/* Stored pairs whose names mean nothing to us, as lines; a repeated name counts the last time. */
static void put_pairs(struct pv__wr *w, pv_text pairs) {
    uint64_t seen[1024] = {0}; /* bit set of name hashes: most names need no search for an earlier line */
    pv_text name;
    pv_text value;
    size_t at = 0;
    while (pv__json_member(pairs, &at, &name, &value)) {
        char shown[SLOT_NAME_MAX];
        uint32_t hash;
        size_t n = pair_name(name, shown, sizeof shown, &hash);
        if (n == 0 || slot_of(shown, n) >= 0) {
            continue;
        }
        size_t line = w->n;
        struct pv__chars c = pv__chars(name, 1);
        int first = 1;
        int b;
        while ((b = pv__chars_next(&c)) >= 0) {
            pv__put_char(w, (char)(first ? pv__upper((unsigned char)b) : pv__lower((unsigned char)b)));
            first = b == '-';
        }
        if ((seen[hash >> 6 & 1023] >> (hash & 63) & 1) != 0 && w->n <= w->cap) {
            /* the new name stands behind the last whole line; compare, cut the old line out, move up */
            struct pv__wr before = {w->p, w->cap, line};
            drop_line(&before, pv__text(w->p + line, n));
            if (before.n != line) {
                memmove(w->p + before.n, w->p + line, n);
                w->n = before.n + n;
            }
        }
        seen[hash >> 6 & 1023] |= (uint64_t)1 << (hash & 63);
        PV__PUT(w, ": ");
        put_value(w, value, 1);
        PV__PUT(w, "\r\n");
    }
}

/* Writes all headers; returns the lane's flags. */
static uint32_t put_headers(struct pv__wr *w, const struct planner *pl, pv_text pairs) {
    uint32_t flags = 0;
    if (pairs.n != 0) {
        put_pairs(w, pairs);
    }
    for (int i = 0; i < H_COUNT; i++) {
        const struct slot *s = &pl->slots[i];
        if (!s->set || i == H_TRANSFER_ENCODING) {
            continue;
        }
        put_header(w, slot_names[i], s);
        flags |= slot_flags[i];
        if (i == H_CONNECTION) {
            struct pv__chars c = pv__chars(s->value, s->json);
            size_t k = 0;
            int b;
            while ((b = pv__chars_next(&c)) >= 0 && k < 5 && b == "close"[k]) {
                k++;
            }
            flags |= k == 5 && b < 0 ? PV_PLAN_CLOSE : 0;
        }
    }
    return flags;
}

/* Stored pairs, if they are a JSON object; those with a meaning go into their slots. */
static pv_text take_pairs(struct planner *pl) {
    pv_text pairs = pl->n->pairs;
    size_t at = 0;
    if ((pl->n->flags & PV_F_PAIRS) == 0 || pairs.n == 0 || pv__json_object(pairs, &at) != 0) {
        return pv__text(NULL, 0);
    }
    pv_text name;
    pv_text value;
    at = 0;
    while (pv__json_member(pairs, &at, &name, &value)) {
        char shown[SLOT_NAME_MAX];
        uint32_t hash;
        size_t n = pair_name(name, shown, sizeof shown, &hash);
        int id = n != 0 ? slot_of(shown, n) : -1;
        if (id >= 0 && id != H_CONTENT_LENGTH && id != H_TRANSFER_ENCODING) {
            pl->slots[id] = (struct slot){value, 1, 1, 0};
        }
    }
    return pairs;
}

/* Name and type (6.4), overrides (6.1), Content-Disposition. */
static void describe(struct planner *pl, const pv_mime *table) {
    const pv_get_req *req = pl->req;
    pl->file = req->filename.n != 0 ? req->filename : pl->n->name;
    if (pl->n->mime.n != 0 && !pv__starts(pl->n->mime, PV__LIT("application/octet-stream"))) {
        pl->mime = pl->n->mime;
    } else if (table != NULL) {
        pv_text ext;
        pv_name_ext(pl->file.p, pl->file.n, &ext);
        if (ext.n != 0) {
            (void)pv_mime_lookup(table, ext.p, ext.n, &pl->mime);
        }
    }
    if (pl->mime.n != 0) {
        set_slot(pl, H_CONTENT_TYPE, pl->mime);
    }
    set_slot(pl, H_ACCEPT_RANGES, PV__LIT("bytes"));
    for (size_t i = 0; i < PV__ARRAY_LEN(override_slots); i++) {
        if (req->overrides[i].p != NULL) {
            set_slot(pl, (enum slot_id)override_slots[i], req->overrides[i]);
        }
    }
    struct slot *d = &pl->slots[H_CONTENT_DISPOSITION];
    if (pl->file.n != 0 && d->value.n == 0) {
        *d = (struct slot){pl->file, 1, 0, (uint8_t)((req->flags & PV_GET_ATTACHMENT) != 0 ? 2 : 1)};
    }
}

static void set_length(struct planner *pl, uint64_t len) {
    struct pv__wr w = pv__writer(pl->length, sizeof pl->length);
    pv__put_u64(&w, len);
    set_slot(pl, H_CONTENT_LENGTH, pv__text(pl->length, w.n));
}

/* Sniffed Content-Type of a body that is len bytes of the data from offset. PV_GET_DONE or PV_GET_NEED_SNIFF. */
static int sniff_type(struct planner *pl, uint64_t offset, uint64_t len, pv_plan *out) {
    if (len == 0 || pl->slots[H_CONTENT_TYPE].set || pl->slots[H_CONTENT_ENCODING].value.n != 0) {
        return PV_GET_DONE;
    }
    const pv_get_needle *n = pl->n;
    size_t want = len < SNIFF_LEN ? (size_t)len : SNIFF_LEN;
    const uint8_t *head = NULL;
    if (n->data != NULL) {
        head = n->data + offset;
    } else if (n->sniff != NULL && n->sniff_offset <= offset && offset - n->sniff_offset <= n->sniff_len &&
               n->sniff_len - (offset - n->sniff_offset) >= want) {
        head = n->sniff + (offset - n->sniff_offset);
    }
    if (head == NULL) {
        out->need_offset = offset;
        out->need_len = want;
        return PV_GET_NEED_SNIFF;
    }
    set_slot(pl, H_CONTENT_TYPE, pv__cstr(pv_sniff(head, want)));
    return PV_GET_DONE;
}

/* Texts and stretches of a body. */
struct body {
    struct pv__wr w; /* the plan's buffer */
    pv_body_part *parts;
    size_t max;
    size_t n;
};

static void add_part(struct body *b, size_t text_from, uint64_t offset, uint64_t len) {
    if (b->n < b->max) {
        b->parts[b->n] = (pv_body_part){offset, len, text_from, b->w.n - text_from};
    }
    b->n++;
}

static void put_boundary(struct pv__wr *w, const uint8_t *random30) {
    for (size_t i = 0; i < BOUNDARY_LEN / 2; i++) {
        pv__put_hex(w, random30[i], 2, pv__hex_lower);
    }
}

/* Renders a multipart/byteranges body; returns its length. */
static uint64_t put_multipart(struct body *b, const struct planner *pl) {
    uint64_t total = pl->n->data_len;
    struct range_iter it;
    pv_range r;
    uint64_t sum = 0;
    size_t begin = b->w.n;
    int first = 1;
    (void)range_begin(pl->req->range, total, &it);
    while (range_next(&it, &r) > 0) {
        size_t from = b->w.n;
        if (first) {
            PV__PUT(&b->w, "--");
        } else {
            PV__PUT(&b->w, "\r\n--");
        }
        first = 0;
        put_boundary(&b->w, pl->req->random30);
        PV__PUT(&b->w, "\r\nContent-Range: ");
        put_content_range(&b->w, &r, total);
        PV__PUT(&b->w, "\r\nContent-Type: ");
        pv__put_text(&b->w, pl->mime);
        PV__PUT(&b->w, "\r\n\r\n");
        add_part(b, from, (uint64_t)r.start, (uint64_t)r.length);
        sum += (uint64_t)r.length;
    }
    size_t from = b->w.n;
    PV__PUT(&b->w, "\r\n--");
    put_boundary(&b->w, pl->req->random30);
    PV__PUT(&b->w, "--\r\n");
    add_part(b, from, 0, 0);
    return sum + (b->w.n - begin);
}

/* Status and headers of what is no 304, and what the body will be: data[offset, +length), a text, or several ranges. */
static int plan_found(struct planner *pl, const pv_mime *mime, pv_text *pairs, pv_plan *out, uint64_t *offset,
                      uint64_t *length, pv_text *refusal, int *multi) {
    const pv_get_req *req = pl->req;
    const pv_get_needle *n = pl->n;
    size_t etag_len = pv_etag(n->checksum, pl->etag, sizeof pl->etag);
    set_slot(pl, H_ETAG, pv__text(pl->etag, etag_len));
    *pairs = take_pairs(pl);
    if ((req->flags & PV_GET_CHUNKED) != 0) {
        set_slot(pl, H_FILE_STORE, PV__LIT("chunked"));
    } else if ((n->flags & PV_F_COMPRESSED) != 0 && !n->plain) {
        if (n->data == NULL && n->data_len != 0) {
            return PV_EINVAL;
        }
        if (n->data_len >= 2 && n->data[0] == 0x1f && n->data[1] == 0x8b) {
            if (!pv__contains(req->accept_encoding, PV__LIT("gzip"))) {
                return PV_GET_NEED_PLAIN;
            }
            set_slot(pl, H_CONTENT_ENCODING, PV__LIT("gzip"));
        }
    }
    describe(pl, mime);

    int head = (req->flags & PV_GET_HEAD) != 0;
    size_t count = 0;
    pv_range r = {0, 0};
    int kind = head ? PV_RANGE_NONE : pv_range_parse(req->range.p, req->range.n, n->data_len, &r, 1, &count);
    out->status = kind == PV_RANGE_SINGLE || kind == PV_RANGE_MULTI ? 206 : 200;
    if (kind == PV_RANGE_NONE) {
        set_length(pl, n->data_len);
        *length = head ? 0 : n->data_len;
    } else if (kind == PV_RANGE_EMPTY) {
        set_length(pl, 0);
    } else if (kind == PV_RANGE_INVALID || kind == PV_RANGE_OUTSIDE) {
        out->status = 416;
        *refusal = kind == PV_RANGE_INVALID ? PV__LIT("invalid range\n") : PV__LIT("Out of Range\n");
        set_slot(pl, H_CONTENT_TYPE, PV__LIT("text/plain; charset=utf-8"));
        set_slot(pl, H_NOSNIFF, PV__LIT("nosniff"));
        set_length(pl, refusal->n);
    } else if (kind == PV_RANGE_SINGLE) {
        size_t len = pv_content_range(&r, n->data_len, pl->range, sizeof pl->range);
        set_slot(pl, H_CONTENT_RANGE, pv__text(pl->range, len));
        if (r.length < 0) {
            out->flags |= PV_PLAN_NO_LENGTH;
        } else {
            set_length(pl, (uint64_t)r.length);
            *offset = (uint64_t)r.start;
            *length = (uint64_t)r.length;
        }
    } else {
        if (req->random30 == NULL) {
            return PV_EINVAL;
        }
        *multi = 1;
        struct pv__wr w = pv__writer(pl->boundary_type, sizeof pl->boundary_type);
        PV__PUT(&w, "multipart/byteranges; boundary=");
        put_boundary(&w, req->random30);
        set_slot(pl, H_CONTENT_TYPE, pv__text(pl->boundary_type, w.n));
        struct body count_only = {pv__writer(NULL, 0), NULL, 0, 0};
        out->body_len = put_multipart(&count_only, pl);
        if (pl->slots[H_CONTENT_ENCODING].value.n != 0 && out->body_len > SMALL_BODY) {
            out->flags |= PV_PLAN_NO_LENGTH;
        } else {
            set_length(pl, out->body_len);
        }
    }
    return sniff_type(pl, *offset, *length, out);
}

int pv_get_plan(const pv_get_req *req, const pv_get_needle *n, const pv_mime *mime, char *buf, size_t cap,
                pv_body_part *parts, size_t max_parts, pv_plan *out, pv_errinfo *err) {
    memset(out, 0, sizeof *out);
    if (n->data_len > INT64_MAX) {
        return pv__fail(err, PV_EINVAL, n->data_len, 0, 0, 0);
    }
    struct planner pl;
    memset(&pl, 0, sizeof pl);
    pl.req = req;
    pl.n = n;
    struct body body = {pv__writer(buf, cap), parts, max_parts, 0};
    pv_text pairs = pv__text(NULL, 0);
    pv_text refusal = pv__text(NULL, 0);
    int multi = 0;
    uint64_t offset = 0; /* of a body that is one stretch of data */
    uint64_t length = 0;
    if (n->last_modified_s != 0) {
        size_t len = pv_http_date((int64_t)n->last_modified_s, pl.last_modified, sizeof pl.last_modified);
        set_slot(&pl, H_LAST_MODIFIED, pv__text(pl.last_modified, len));
    }
    if (pv_cond_eval(req->if_modified_since, req->if_none_match, n->last_modified_s, n->checksum)) {
        out->status = 304;
    } else {
        int rc = plan_found(&pl, mime, &pairs, out, &offset, &length, &refusal, &multi);
        if (rc != PV_GET_DONE) {
            return rc < 0 ? pv__fail(err, rc, 0, 0, 0, 0) : rc;
        }
    }
    out->flags |= put_headers(&body.w, &pl, pairs);
    out->head_len = body.w.n;
    if (multi) {
        (void)put_multipart(&body, &pl);
    } else if (length != 0 || refusal.n != 0) {
        size_t from = body.w.n;
        pv__put_text(&body.w, refusal);
        add_part(&body, from, offset, length);
        out->body_len = length + refusal.n;
    }
    out->parts = body.n;
    if (body.w.n > cap || body.n > max_parts) {
        return pv__fail(err, PV_EBUFFER, body.w.n, body.n, 0, 0);
    }
    return PV_GET_DONE;
}
