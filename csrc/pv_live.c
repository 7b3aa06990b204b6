/* pv_live.c - what is live in an index, in ascending order of keys, with upstream's counters: the raw material of a needle map
 * that is kept outside of the engine. Holds a compact map of the rows for as long as it is open.
 */
#include "pv_int.h"

#include <stdbool.h>

#define BATCH 1024U

struct pv_live {
    pv_map *map;
    uint64_t from;
    bool ended;
    uint32_t have;
    uint32_t used;
    pv_idx_row rows[BATCH];
};

int pv_live_open(int idx_fd, uint8_t width, uint64_t max_rows, pv_live **out, pv_map_stats *stats, pv_errinfo *err) {
    pv_errinfo own_err;
    err = err != NULL ? err : &own_err;
    pv__err_clear(err);
    *out = NULL;
    memset(stats, 0, sizeof *stats);
    if (width != 4 && width != 5) {
        return pv__fail(err, PV_EINVAL, width, 0, 0, 0);
    }
    pv_live *l = pv__calloc(1, sizeof *l);
    int rc = l == NULL ? PV_ENOMEM : pv_map_new(width, &l->map);
    if (rc < 0) {
        pv_live_free(l);
        return pv__fail(err, rc, sizeof *l, 0, 0, 0);
    }
    uint64_t loaded;
    rc = pv__map_load_rows(l->map, idx_fd, 0, max_rows, &loaded, err);
    if (rc == 0) {
        rc = pv__index_count(idx_fd, width, max_rows, l->map, stats, err);
    }
    if (rc < 0) {
        pv_live_free(l);
        return rc;
    }
    uint64_t from = 0;
    int got;
    while ((got = pv_map_visit(l->map, from, l->rows, BATCH)) > 0) {
        for (int i = 0; i < got; i++) {
            stats->entries += l->rows[i].offset != 0 && l->rows[i].size >= 0;
        }
        if (l->rows[got - 1].key == UINT64_MAX) {
            break;
        }
        from = l->rows[got - 1].key + 1;
    }
    *out = l;
    return 0;
}

static void refill(pv_live *l) {
    int got = l->ended ? 0 : pv_map_visit(l->map, l->from, l->rows, BATCH);
    l->used = 0;
    l->have = got > 0 ? (uint32_t)got : 0;
    l->ended = l->have == 0 || l->rows[l->have - 1].key == UINT64_MAX;
    l->from = l->ended ? 0 : l->rows[l->have - 1].key + 1;
}

/* The next live row; NULL at the end. */
static const pv_idx_row *next_live(pv_live *l) {
    for (;;) {
        if (l->used == l->have) {
            refill(l);
            if (l->have == 0) {
                return NULL;
            }
        }
        const pv_idx_row *r = &l->rows[l->used++];
        if (r->offset != 0 && r->size >= 0) {
            return r;
        }
    }
}

int pv_live_next(pv_live *l, uint8_t *buf, size_t max) {
    if (max == 0 || max > INT32_MAX) {
        return PV_EINVAL;
    }
    size_t count = 0;
    for (const pv_idx_row *r; count < max && (r = next_live(l)) != NULL; count++) {
        uint8_t *to = buf + count * PV_LIVE_ENTRY;
        pv__put_be64(to, r->key);
        pv__put_be64(to + 8, r->offset);
        pv__put_be32(to + 16, (uint32_t)r->size);
    }
    return (int)count;
}

int pv_live_same(pv_live *a, pv_live *b) {
    for (;;) {
        const pv_idx_row *x = next_live(a);
        const pv_idx_row *y = next_live(b);
        if (x == NULL || y == NULL) {
            return x == y;
        }
        if (x->key != y->key || x->size != y->size) {
            return 0;
        }
    }
}

void pv_live_free(pv_live *l) {
    if (l != NULL) {
        pv_map_free(l->map);
        pv__free(l);
    }
}
