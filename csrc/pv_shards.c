/* pv_shards.c - what one server has of an erasure coded volume, for lanes that must not ask Python.
 *
 * A pv_shards never changes but for what is known of shards elsewhere (two atomics): when a shard comes or goes, Python makes
 * another and publishes that. It holds counted descriptors, so a read that has begun ends well whatever is unmounted. Deletes
 * are in a set of their own, which outlives it.
 */
#include "pv_int.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#define IDS_MIN 64U
#define IDS_MAX ((size_t)1 << 40)
#define BURIED_ROWS 4096U
#define INLINE_LOST ((size_t)16384) /* bytes of a lost shard that are made while a connection's thread waits */

/* ------------------------------------------------------------------ counted descriptors */

struct pv_file {
    _Atomic uint32_t refs;
    int fd;
};

int pv_file_new(int fd, pv_file **out) {
    *out = NULL;
    if (fd < 0) {
        return PV_EINVAL;
    }
    pv_file *f = pv__malloc(sizeof *f);
    if (f == NULL) {
        return PV_ENOMEM;
    }
    atomic_init(&f->refs, 1);
    f->fd = fd;
    *out = f;
    return 0;
}

pv_file *pv_file_ref(pv_file *f) {
    if (f != NULL) {
        atomic_fetch_add_explicit(&f->refs, 1, memory_order_relaxed);
    }
    return f;
}

void pv_file_unref(pv_file *f) {
    if (f != NULL && atomic_fetch_sub_explicit(&f->refs, 1, memory_order_acq_rel) == 1) {
        (void)pv__io_close(f->fd, NULL);
        pv__free(f);
    }
}

/* ------------------------------------------------------------------ sets of ids */

/* Open addressing with linear probing, at most half full. Id 0 marks an empty slot and is kept apart. */
struct pv_ids {
    _Atomic uint32_t refs;
    pthread_rwlock_t lock;
    uint64_t *slots;
    size_t mask; /* slots - 1, a power of two less one */
    size_t count;
    bool zero;
};

int pv_ids_new(pv_ids **out) {
    *out = NULL;
    pv_ids *s = pv__calloc(1, sizeof *s);
    uint64_t *slots = pv__calloc(IDS_MIN, sizeof *slots);
    if (s == NULL || slots == NULL || pv__rwlock_init(&s->lock) < 0) {
        pv__free(s);
        pv__free(slots);
        return PV_ENOMEM;
    }
    atomic_init(&s->refs, 1);
    s->slots = slots;
    s->mask = IDS_MIN - 1;
    *out = s;
    return 0;
}

pv_ids *pv_ids_ref(pv_ids *s) {
    if (s != NULL) {
        atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
    }
    return s;
}

void pv_ids_unref(pv_ids *s) {
    if (s != NULL && atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) == 1) {
        pv__must(pthread_rwlock_destroy(&s->lock));
        pv__free(s->slots);
        pv__free(s);
    }
}

/* The slot of an id, or the empty one where it would go. */
static size_t slot_of(const uint64_t *slots, size_t mask, uint64_t id) {
    uint64_t h = id * UINT64_C(0x9E3779B97F4A7C15);
    size_t i = (size_t)(h ^ (h >> 32)) & mask;
    while (slots[i] != 0 && slots[i] != id) {
        i = (i + 1) & mask;
    }
    return i;
}

/* lock held exclusively. On failure the set is as before. */
static int widen(pv_ids *s) {
    size_t size = s->mask + 1;
    uint64_t *wider = size < IDS_MAX ? pv__calloc(size * 2, sizeof *wider) : NULL;
    if (wider == NULL) {
        return PV_ENOMEM;
    }
    for (size_t i = 0; i < size; i++) {
        if (s->slots[i] != 0) {
            wider[slot_of(wider, size * 2 - 1, s->slots[i])] = s->slots[i];
        }
    }
    pv__free(s->slots);
    s->slots = wider;
    s->mask = size * 2 - 1;
    return 0;
}

/* lock held exclusively. 1, 0 if it was there, PV_ENOMEM. */
static int add(pv_ids *s, uint64_t id) {
    if (id == 0) {
        int is_new = s->zero ? 0 : 1;
        s->zero = true;
        return is_new;
    }
    if (s->slots[slot_of(s->slots, s->mask, id)] == id) {
        return 0;
    }
    int rc = (s->count + 1) * 2 > s->mask + 1 ? widen(s) : 0;
    if (rc < 0) {
        return rc;
    }
    s->slots[slot_of(s->slots, s->mask, id)] = id;
    s->count++;
    return 1;
}

int pv_ids_add(pv_ids *s, uint64_t id) {
    pv__wrlock(&s->lock);
    int rc = add(s, id);
    pv__rwunlock(&s->lock);
    return rc;
}

int pv_ids_add_bytes(pv_ids *s, const uint8_t *ids, size_t len) {
    int rc = 0;
    pv__wrlock(&s->lock);
    for (size_t at = 0; rc >= 0 && len - at >= 8; at += 8) {
        rc = add(s, pv__get_be64(ids + at));
    }
    pv__rwunlock(&s->lock);
    return rc < 0 ? rc : 0;
}

/* lock held. */
static bool has(const pv_ids *s, uint64_t id) {
    return id == 0 ? s->zero : s->slots[slot_of(s->slots, s->mask, id)] == id;
}

int pv_ids_has(pv_ids *s, uint64_t id) {
    pv__rdlock(&s->lock);
    bool found = has(s, id);
    pv__rwunlock(&s->lock);
    return found ? 1 : 0;
}

uint64_t pv_ids_count(pv_ids *s) {
    pv__rdlock(&s->lock);
    uint64_t count = s->count + (s->zero ? 1 : 0);
    pv__rwunlock(&s->lock);
    return count;
}

uint64_t pv_ids_list(pv_ids *s, uint64_t *out, uint64_t max) {
    uint64_t n = 0;
    pv__rdlock(&s->lock);
    if (s->zero && n < max) {
        out[n++] = 0;
    }
    for (size_t i = 0; i <= s->mask && n < max; i++) {
        if (s->slots[i] != 0) {
            out[n++] = s->slots[i];
        }
    }
    pv__rwunlock(&s->lock);
    return n;
}

int pv_ids_covers(pv_ids *s, pv_ids *of) {
    if (s == of) {
        return 1;
    }
    pv_ids *low = (uintptr_t)s < (uintptr_t)of ? s : of; /* two locks at a time are taken in this order */
    pv_ids *high = low == s ? of : s;
    pv__rdlock(&low->lock);
    pv__rdlock(&high->lock);
    bool covers = !of->zero || s->zero;
    for (size_t i = 0; covers && i <= of->mask; i++) {
        covers = of->slots[i] == 0 || has(s, of->slots[i]);
    }
    pv__rwunlock(&high->lock);
    pv__rwunlock(&low->lock);
    return covers ? 1 : 0;
}

int pv_ecx_buried(int fd, uint8_t width, uint64_t rows, pv_ids *into, pv_errinfo *err) {
    pv__err_clear(err);
    pv_idx_row *read = pv__malloc(BURIED_ROWS * sizeof *read);
    if (read == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, 0, 0);
    }
    int rc = 0;
    for (uint64_t at = 0; rc >= 0 && at < rows; at += (uint64_t)rc) {
        rc = pv_idx_read(fd, width, at, read, rows - at < BURIED_ROWS ? (size_t)(rows - at) : BURIED_ROWS, err);
        if (rc == 0) {
            break;
        }
        for (int i = 0; i < rc; i++) {
            if (read[i].size < 0 && pv_ids_add(into, read[i].key) < 0) {
                rc = pv__fail(err, PV_ENOMEM, 0, 0, read[i].key, 0);
            }
        }
    }
    pv__free(read);
    return rc < 0 ? rc : 0;
}

/* ------------------------------------------------------------------ shards */

struct pv_shards {
    _Atomic uint32_t refs;
    pv_file *ecx;
    pv_ids *deleted;
    pv_file *files[PV_EC_MAX_SHARDS];
    int32_t fds[PV_EC_MAX_SHARDS]; /* of files; -1: not here */
    pv_ec_layout layout;
    uint64_t rows;
    uint8_t width;
    uint8_t version;
    _Atomic uint32_t elsewhere;      /* bits of shards that other servers have */
    _Atomic uint64_t known_until_ms; /* how long that is to be believed */
};

static uint64_t clock_ms(void) {
    struct timespec now;
    pv__must(clock_gettime(CLOCK_MONOTONIC, &now));
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

int pv_shards_new(const pv_shards_opts *opts, pv_shards **out) {
    const pv_ec_layout *l = &opts->layout;
    *out = NULL;
    if (opts->ecx == NULL || opts->deleted == NULL || l->data_shards == 0 || l->parity_shards == 0 ||
        l->data_shards > PV_EC_MAX_SHARDS || l->parity_shards > PV_EC_MAX_SHARDS - l->data_shards ||
        (opts->width != 4 && opts->width != 5) || opts->version < 1 || opts->version > 3) {
        return PV_EINVAL;
    }
    pv_shards *s = pv__calloc(1, sizeof *s);
    if (s == NULL) {
        return PV_ENOMEM;
    }
    atomic_init(&s->refs, 1);
    atomic_init(&s->elsewhere, UINT32_MAX);
    atomic_init(&s->known_until_ms, 0);
    s->ecx = pv_file_ref(opts->ecx);
    s->deleted = pv_ids_ref(opts->deleted);
    s->layout = *l;
    s->rows = opts->rows;
    s->width = opts->width;
    s->version = opts->version;
    for (uint32_t i = 0; i < PV_EC_MAX_SHARDS; i++) {
        s->files[i] = i < l->data_shards + l->parity_shards ? pv_file_ref(opts->files[i]) : NULL;
        s->fds[i] = s->files[i] != NULL ? s->files[i]->fd : -1;
    }
    *out = s;
    return 0;
}

pv_shards *pv_shards_ref(pv_shards *s) {
    if (s != NULL) {
        atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
    }
    return s;
}

void pv_shards_unref(pv_shards *s) {
    if (s != NULL && atomic_fetch_sub_explicit(&s->refs, 1, memory_order_acq_rel) == 1) {
        for (uint32_t i = 0; i < PV_EC_MAX_SHARDS; i++) {
            pv_file_unref(s->files[i]);
        }
        pv_file_unref(s->ecx);
        pv_ids_unref(s->deleted);
        pv__free(s);
    }
}

void pv_shards_elsewhere(pv_shards *s, uint32_t shards, uint32_t ttl_ms) {
    atomic_store(&s->known_until_ms, 0); /* nobody may take the new time for the old shards */
    atomic_store(&s->elsewhere, shards);
    atomic_store(&s->known_until_ms, ttl_ms != 0 ? clock_ms() + ttl_ms : 0);
}

/* Bits of the shards whose bytes may be made of others here: those that nobody else has, as far as is known. Another server
 * may know of a delete that this one does not. */
static uint32_t may_be_made(pv_shards *s) {
    uint64_t until_ms = atomic_load(&s->known_until_ms);
    uint32_t elsewhere = atomic_load(&s->elsewhere);
    if (until_ms == 0 || clock_ms() >= until_ms || atomic_load(&s->known_until_ms) != until_ms) {
        return 0;
    }
    return ~elsewhere;
}

int pv_shards_find(pv_shards *s, uint64_t id, uint32_t flags, pv_idx_row *row, pv_errinfo *err) {
    uint64_t index;
    pv__err_clear(err);
    if (pv_ids_has(s->deleted, id)) {
        return pv__fail(err, PV_EDELETED, 0, 0, id, 0);
    }
    int rc = pv__ecx_find(s->ecx->fd, s->width, s->rows, id, (flags & PV_READ_CACHED) != 0, row, &index, err);
    if (rc < 0) {
        return rc;
    }
    return rc == 0         ? pv__fail(err, PV_ENOTFOUND, 0, 0, id, 0)
           : row->size < 0 ? pv__fail(err, PV_EDELETED, 0, 0, id, 0)
                           : 0;
}

int pv_shards_read(pv_shards *s, const pv_idx_row *row, uint32_t flags, pv_read *out, pv_errinfo *err) {
    pv__err_clear(err);
    memset(out, 0, sizeof *out);
    int64_t len = pv_needle_record_len(row->size, s->version);
    if (row->size <= 0 || len <= 0 || len > INT32_MAX) {
        return pv__fail(err, PV_EINVAL, (uint64_t)row->size, 0, row->key, 0);
    }
    uint8_t *buf = pv__malloc((size_t)len);
    if (buf == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, row->key, 0);
    }
    bool cached = (flags & PV_READ_CACHED) != 0;
    pv__ec_how how = {.make = may_be_made(s), .cached = cached, .make_max = cached ? INLINE_LOST : SIZE_MAX};
    int rc = pv__ec_read(s->fds, &s->layout, row->offset, (size_t)len, buf, &how, err);
    if (rc == 0) {
        rc = pv_needle_parse(buf, (size_t)len, s->version, row->size, row->offset, 0, &out->n, err);
    }
    if (rc == 0 && out->n.id != row->key) {
        rc = pv__fail(err, PV_ECORRUPT, row->offset, 0, row->key, 0);
    }
    if (rc < 0) {
        pv__free(buf);
        memset(out, 0, sizeof *out);
        return rc;
    }
    out->buf = buf;
    out->buf_len = (size_t)len;
    return 0;
}
