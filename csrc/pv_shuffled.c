/* pv_shuffled.c - loading an index whose keys come in no order: rows are brought into the order of keys first, for a map
 * takes rising keys many times faster than shuffled ones, which each go to another leaf.
 *
 * Three passes over the file, all of them sequential. The first finds what keys, offsets and sizes span; the second counts
 * the rows of each bucket, a bucket being an equal part of the range of keys; the third puts each row, packed into 8 bytes
 * (16 if it spans too much), to its bucket's place. Then bucket after bucket is sorted and given to the map, and the memory
 * of those that are through goes back. Rows of one key stay in the order of the file throughout, which is all that a map's
 * content and counters depend on.
 *
 * On their way to the buckets rows of 8 bytes gather in lines of eight: a write to one of thousands of places at a time costs a
 * miss of the cache and of the page table each, and so it is one for eight rows.
 *
 * If 8 bytes a row are not enough the third pass is made for a part of the buckets at a time. Keys that crowd in few
 * buckets are no harm: such a bucket is given to the map as it stands, which is what a load without all this does.
 */
#include "pv_int.h"

#include <stdbool.h>

#define READ_ROWS 4096U
#define CHUNK_BITS 16U
#define CHUNK_ROWS ((uint64_t)1 << CHUNK_BITS)
/* 4096 rows in a bucket if they are spread evenly, but no more buckets than caches have lines to write to at once. */
#define BUCKET_ROWS_BITS 12U
#define BUCKET_BITS_MIN 8U
#define BUCKET_BITS_MAX 12U
#define SORT_MAX 65536U /* rows of a bucket; more are not sorted */
#define DIGIT_BITS 8U
#define LINE_ROWS 8U /* of 8 bytes: a line of the cache */
#define DELTA_BITS_MAX 48U

typedef struct span {
    uint64_t key_min;
    uint64_t key_max;
    uint64_t units8_max;
    uint32_t size_max;
} span;

/* A row; high is used only where 64 bits are not enough. The key's distance from its bucket's first is in the low bits. */
typedef struct packed {
    uint64_t low;
    uint64_t high;
} packed;

typedef struct loader {
    pv_map *map;
    int fd;
    uint8_t width;
    uint64_t first_row;
    uint64_t rows;
    uint64_t key_min;
    uint64_t key_span; /* from the smallest key to the largest */
    unsigned shift;    /* of a key's distance from key_min: gives its bucket */
    unsigned delta_bits;
    unsigned units8_bits;
    bool wide; /* 16 bytes for a packed row */
    uint32_t buckets;
    uint32_t *count;  /* rows of each bucket */
    uint32_t *cursor; /* where the next row of a bucket goes; behind its last one in the end */
    uint64_t *lines;  /* LINE_ROWS for each bucket: rows that are not at their place yet; not for wide ones */
    uint64_t **chunks;
    size_t chunk_count;
    pv_idx_row *read;
    packed *bucket; /* SORT_MAX each */
    packed *other;
} loader;

static unsigned bits_of(uint64_t v) {
    return v == 0 ? 0 : 64U - (unsigned)__builtin_clzll(v);
}

static bool is_live(const pv_idx_row *row) {
    return row->offset != 0 && row->size >= 0;
}

/* Reads batch after batch; more(ctx, rows, count) is called for each. PV_EEOF if the file has become shorter. */
static int each_batch(loader *l, int (*more)(loader *, const pv_idx_row *, size_t, void *), void *ctx,
                      pv_errinfo *err) {
    for (uint64_t done = 0; done < l->rows;) {
        size_t want = l->rows - done < READ_ROWS ? (size_t)(l->rows - done) : READ_ROWS;
        int rc = pv_idx_read(l->fd, l->width, l->first_row + done, l->read, want, err);
        if (rc < 0) {
            return rc;
        }
        if ((size_t)rc < want) {
            return pv__fail(err, PV_EEOF, l->first_row + done, want, (uint64_t)rc, 1);
        }
        rc = more(l, l->read, want, ctx);
        if (rc < 0) {
            return pv__fail(err, rc, l->first_row + done, 0, 0, 1);
        }
        done += want;
    }
    return 0;
}

static int widen(loader *l, const pv_idx_row *rows, size_t n, void *ctx) {
    (void)l;
    span *s = ctx;
    for (size_t i = 0; i < n; i++) {
        s->key_min = rows[i].key < s->key_min ? rows[i].key : s->key_min;
        s->key_max = rows[i].key > s->key_max ? rows[i].key : s->key_max;
        if (is_live(&rows[i])) {
            uint64_t units8 = rows[i].offset / 8;
            s->units8_max = units8 > s->units8_max ? units8 : s->units8_max;
            s->size_max = (uint32_t)rows[i].size > s->size_max ? (uint32_t)rows[i].size : s->size_max;
        }
    }
    return 0;
}

static inline uint64_t bucket_of(const loader *l, uint64_t key) {
    return (key - l->key_min) >> l->shift;
}

/* A file that changes between the passes could have any key here. */
static int count_rows(loader *l, const pv_idx_row *rows, size_t n, void *ctx) {
    (void)ctx;
    for (size_t i = 0; i < n; i++) {
        uint64_t b = bucket_of(l, rows[i].key);
        if (b >= l->buckets) {
            return PV_ECORRUPT;
        }
        l->count[b]++;
    }
    return 0;
}

/* ------------------------------------------------------------------ packed rows */

/* Size as it is packed: 0 for a delete, whose size and place say nothing. */
static inline uint64_t packed_size(const pv_idx_row *row) {
    return is_live(row) ? (uint64_t)(uint32_t)row->size + 1 : 0;
}

static inline packed pack(const loader *l, const pv_idx_row *row) {
    uint64_t delta = (row->key - l->key_min) & (((uint64_t)1 << l->shift) - 1);
    uint64_t size = packed_size(row);
    uint64_t units8 = size != 0 ? row->offset / 8 : 0;
    return l->wide ? (packed){delta | units8 << DELTA_BITS_MAX, units8 >> (64 - DELTA_BITS_MAX) | size << 32}
                   : (packed){delta | units8 << l->delta_bits | size << (l->delta_bits + l->units8_bits), 0};
}

static inline void unpack(const loader *l, const packed *p, uint64_t base, pv_idx_row *row) {
    uint64_t units8;
    uint64_t size;
    if (l->wide) {
        units8 = p->low >> DELTA_BITS_MAX | (p->high & UINT32_MAX) << (64 - DELTA_BITS_MAX);
        size = p->high >> 32;
    } else {
        units8 = p->low >> l->delta_bits & (((uint64_t)1 << l->units8_bits) - 1);
        size = p->low >> (l->delta_bits + l->units8_bits);
    }
    row->key = base + (p->low & (((uint64_t)1 << l->delta_bits) - 1));
    row->offset = units8 * 8;
    row->size = size == 0 ? -1 : (int32_t)(size - 1);
    row->reserved = 0;
}

static inline void store_wide(const loader *l, uint64_t at, packed p) {
    uint64_t *chunk = l->chunks[at >> CHUNK_BITS];
    at &= CHUNK_ROWS - 1;
    chunk[2 * at] = p.low;
    chunk[2 * at + 1] = p.high;
}

/* Puts what has gathered of a line at its place, behind whose last row `end` is. */
static inline void store_line(const loader *l, uint64_t b, uint64_t end) {
    uint64_t at = (end - 1) & ~(uint64_t)(LINE_ROWS - 1);
    uint64_t *to = l->chunks[at >> CHUNK_BITS] + (at & (CHUNK_ROWS - 1));
    memcpy(to, l->lines + b * LINE_ROWS, LINE_ROWS * sizeof *to);
}

/* Buckets begin with a line. */
static inline uint64_t line_begin(uint64_t at) {
    return (at + LINE_ROWS - 1) & ~(uint64_t)(LINE_ROWS - 1);
}

static inline bool fits_narrow(const loader *l, const pv_idx_row *row) {
    unsigned size_bits = 64 - l->delta_bits - l->units8_bits;
    return (size_bits >= 32 || packed_size(row) >> size_bits == 0) &&
           (!is_live(row) || row->offset / 8 >> l->units8_bits == 0);
}

/* The buckets of a round, and where each ends in the packed rows. */
typedef struct part {
    uint32_t first;
    uint32_t end;
} part;

static int place_rows(loader *l, const pv_idx_row *rows, size_t n, void *ctx) {
    const part *p = ctx;
    const uint64_t limit = (uint64_t)l->chunk_count << CHUNK_BITS;
    for (size_t i = 0; i < n; i++) {
        uint64_t b = bucket_of(l, rows[i].key);
        if (b < p->first || b >= p->end) {
            continue;
        }
        /* All this holds as long as the file does not change. */
        if (l->cursor[b] >= limit || rows[i].key - l->key_min > l->key_span ||
            (!l->wide && !fits_narrow(l, &rows[i]))) {
            return PV_ECORRUPT;
        }
        uint64_t at = l->cursor[b]++;
        packed row = pack(l, &rows[i]);
        if (l->wide) {
            store_wide(l, at, row);
            continue;
        }
        l->lines[b * LINE_ROWS + at % LINE_ROWS] = row.low;
        if (at % LINE_ROWS == LINE_ROWS - 1) {
            store_line(l, b, at + 1);
        }
    }
    return 0;
}

/* ------------------------------------------------------------------ sorting and giving */

/* Where the rows of each value of a digit go, from how many there are. */
static void places(uint32_t *at, uint64_t mask) {
    for (uint64_t i = 1; i <= mask; i++) {
        at[i] += at[i - 1];
    }
}

static uint64_t mask_of(const loader *l, unsigned digit) {
    return digit + DIGIT_BITS <= l->shift ? (1U << DIGIT_BITS) - 1 : ((uint64_t)1 << (l->shift - digit)) - 1;
}

/* Sorts by distance, digit after digit; stable. The result is in l->bucket. */
static void sort_wide(loader *l, size_t n) {
    for (unsigned digit = 0; digit < l->shift; digit += DIGIT_BITS) {
        uint32_t at[(1U << DIGIT_BITS) + 1] = {0};
        const uint64_t mask = mask_of(l, digit);
        for (size_t i = 0; i < n; i++) {
            at[(l->bucket[i].low >> digit & mask) + 1]++;
        }
        places(at, mask);
        for (size_t i = 0; i < n; i++) {
            l->other[at[l->bucket[i].low >> digit & mask]++] = l->bucket[i];
        }
        packed *sorted = l->other;
        l->other = l->bucket;
        l->bucket = sorted;
    }
}

/* The same for rows of 8 bytes, which begin at *rows; other has as much room. The result is in *rows. */
static void sort_narrow(const loader *l, uint64_t **rows, uint64_t *other, size_t n) {
    uint64_t *from = *rows;
    for (unsigned digit = 0; digit < l->shift; digit += DIGIT_BITS) {
        uint32_t at[(1U << DIGIT_BITS) + 1] = {0};
        const uint64_t mask = mask_of(l, digit);
        for (size_t i = 0; i < n; i++) {
            at[(from[i] >> digit & mask) + 1]++;
        }
        places(at, mask);
        for (size_t i = 0; i < n; i++) {
            other[at[from[i] >> digit & mask]++] = from[i];
        }
        uint64_t *sorted = other;
        other = from;
        from = sorted;
    }
    *rows = from;
}

/* Takes n rows at `at` out, sorted if so asked: wide ones to l->bucket, others to *narrow, which lies there, too. */
static void take_rows(loader *l, uint64_t at, size_t n, bool sorts, uint64_t **narrow) {
    if (l->wide) {
        for (size_t i = 0; i < n; i++) {
            const uint64_t *chunk = l->chunks[(at + i) >> CHUNK_BITS];
            uint64_t within = (at + i) & (CHUNK_ROWS - 1);
            l->bucket[i] = (packed){chunk[2 * within], chunk[2 * within + 1]};
        }
        if (sorts) {
            sort_wide(l, n);
        }
        return;
    }
    *narrow = (uint64_t *)l->bucket;
    for (size_t done = 0; done < n;) {
        uint64_t within = (at + done) & (CHUNK_ROWS - 1);
        size_t count = CHUNK_ROWS - within < n - done ? (size_t)(CHUNK_ROWS - within) : n - done;
        memcpy(*narrow + done, l->chunks[(at + done) >> CHUNK_BITS] + within, count * sizeof **narrow);
        done += count;
    }
    if (sorts) {
        sort_narrow(l, narrow, (uint64_t *)l->other, n);
    }
}

/* Gives the rows of a bucket, which stand at [at, end), to the map. */
static int give_bucket(loader *l, uint64_t base, uint64_t at, uint64_t end) {
    bool sorts = end - at <= SORT_MAX;
    while (at < end) {
        size_t n = end - at < SORT_MAX ? (size_t)(end - at) : SORT_MAX;
        uint64_t *narrow = NULL;
        take_rows(l, at, n, sorts, &narrow);
        at += n;
        for (size_t done = 0; done < n;) {
            size_t count = n - done < READ_ROWS ? n - done : READ_ROWS;
            for (size_t i = 0; i < count; i++) {
                packed row = narrow != NULL ? (packed){narrow[done + i], 0} : l->bucket[done + i];
                unpack(l, &row, base, &l->read[i]);
            }
            uint64_t ignored = 0;
            int rc = pv__map_apply(l->map, l->read, count, &ignored);
            if (rc < 0) {
                return rc;
            }
            done += count;
        }
    }
    return 0;
}

static size_t chunk_bytes(const loader *l) {
    return (size_t)CHUNK_ROWS * sizeof(uint64_t) * (l->wide ? 2 : 1);
}

static void drop_chunk(loader *l, size_t i) {
    if (l->chunks[i] != NULL) {
        pv__pages_free(l->chunks[i], chunk_bytes(l));
        l->chunks[i] = NULL;
    }
}

static int one_round(loader *l, const part *p, pv_errinfo *err) {
    uint64_t at = 0;
    for (uint32_t b = p->first; b < p->end; b++) {
        at = line_begin(at);
        l->cursor[b] = (uint32_t)at;
        at += l->count[b];
    }
    size_t chunks = (size_t)((at + CHUNK_ROWS - 1) >> CHUNK_BITS);
    for (; l->chunk_count < chunks; l->chunk_count++) {
        l->chunks[l->chunk_count] = pv__pages(chunk_bytes(l));
        if (l->chunks[l->chunk_count] == NULL) {
            return pv__fail(err, PV_ENOMEM, chunk_bytes(l), 0, 0, 0);
        }
    }
    part mutable_part = *p;
    int rc = each_batch(l, place_rows, &mutable_part, err);
    uint64_t begin = 0;
    size_t dropped = 0;
    for (uint32_t b = p->first; b < p->end && rc == 0; b++) {
        begin = line_begin(begin);
        uint64_t end = l->cursor[b];
        if (end != begin + l->count[b]) {
            return pv__fail(err, PV_ECORRUPT, 0, 0, 0, 1);
        }
        if (!l->wide && end % LINE_ROWS != 0) {
            store_line(l, b, end);
        }
        rc = give_bucket(l, l->key_min + ((uint64_t)b << l->shift), begin, end);
        for (; dropped < end >> CHUNK_BITS; dropped++) {
            drop_chunk(l, dropped);
        }
        begin = end;
        if (rc < 0) {
            return pv__fail(err, rc, 0, 0, 0, 0);
        }
    }
    for (size_t i = 0; i < l->chunk_count; i++) {
        drop_chunk(l, i);
    }
    l->chunk_count = 0;
    return rc;
}

static void plan(loader *l, const span *s) {
    unsigned bits = bits_of(l->rows >> BUCKET_ROWS_BITS);
    bits = bits < BUCKET_BITS_MIN ? BUCKET_BITS_MIN : bits > BUCKET_BITS_MAX ? BUCKET_BITS_MAX : bits;
    l->key_min = s->key_min;
    l->key_span = s->key_max - s->key_min;
    unsigned range = bits_of(l->key_span);
    l->shift = range > bits ? range - bits : 0;
    if (l->shift > DELTA_BITS_MAX) {
        l->shift = DELTA_BITS_MAX; /* then there are 2^16 */
    }
    l->buckets = (uint32_t)((l->key_span >> l->shift) + 1);
    l->delta_bits = l->shift;
    l->units8_bits = bits_of(s->units8_max);
    l->wide = l->delta_bits + l->units8_bits + bits_of((uint64_t)s->size_max + 1) > 64;
    if (l->wide) {
        l->delta_bits = DELTA_BITS_MAX;
        l->units8_bits = 48;
    }
}

static void loader_free(loader *l) {
    for (size_t i = 0; l->chunks != NULL && i < l->chunk_count; i++) {
        drop_chunk(l, i);
    }
    pv__free(l->chunks);
    pv__free(l->count);
    pv__free(l->cursor);
    pv__free(l->lines);
    pv__free(l->read);
    pv__free(l->bucket);
    pv__free(l->other);
}

int pv__map_load_shuffled(pv_map *m, int fd, uint8_t width, uint64_t first_row, uint64_t rows, pv_errinfo *err) {
    loader l = {.map = m, .fd = fd, .width = width, .first_row = first_row, .rows = rows};
    span s = {.key_min = UINT64_MAX};
    if (rows == 0 || rows > PV__SHUFFLED_ROWS_MAX) {
        return pv__fail(err, PV_EINVAL, rows, 0, 0, 0);
    }
    int rc = PV_ENOMEM;
    l.read = pv__malloc(READ_ROWS * sizeof *l.read);
    l.bucket = pv__malloc(SORT_MAX * sizeof *l.bucket);
    l.other = pv__malloc(SORT_MAX * sizeof *l.other);
    if (l.read == NULL || l.bucket == NULL || l.other == NULL) {
        goto out;
    }
    rc = each_batch(&l, widen, &s, err);
    if (rc < 0) {
        goto out;
    }
    plan(&l, &s);
    /* What a part may hold: 8 bytes for each of all rows. */
    uint64_t most = l.wide ? rows / 2 + 1 : rows;
    rc = PV_ENOMEM;
    l.count = pv__calloc(l.buckets, sizeof *l.count);
    l.cursor = pv__calloc(l.buckets, sizeof *l.cursor);
    l.lines = pv__calloc((size_t)l.buckets * LINE_ROWS, sizeof *l.lines);
    l.chunks = pv__calloc((size_t)((rows + (uint64_t)l.buckets * LINE_ROWS) >> CHUNK_BITS) + 1, sizeof *l.chunks);
    if (l.count == NULL || l.cursor == NULL || l.lines == NULL || l.chunks == NULL) {
        goto out;
    }
    rc = each_batch(&l, count_rows, NULL, err);
    for (part p = {0, 0}; rc == 0 && p.first < l.buckets; p.first = p.end) {
        uint64_t held = 0;
        for (p.end = p.first; p.end < l.buckets && (held == 0 || held + l.count[p.end] <= most); p.end++) {
            held += l.count[p.end];
        }
        rc = one_round(&l, &p, err);
    }
out:
    loader_free(&l);
    return rc == PV_ENOMEM ? pv__fail(err, PV_ENOMEM, rows, 0, 0, 0) : rc;
}
