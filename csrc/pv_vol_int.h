/* pv_vol_int.h - the inside of a volume handle, for the sources that work on it: pv_vol.c and pv_compact.c.
 *
 * How generations, appends and flushes work is told at the head of pv_vol.c.
 */
#ifndef PV_VOL_INT_H
#define PV_VOL_INT_H

#include <stdatomic.h>
#include <stdbool.h>

#include "pv_int.h"

#define PV__GIB32 ((uint64_t)1 << 35) /* what 4 bytes of offset in units of 8 reach; old volumes wrapped there */
#define PV__ROW_MAX 17U

typedef struct gen {
    uint32_t refs; /* guarded by state_lock; the handle holds one */
    int dat_fd;
    int idx_fd;
    pv_map *map;          /* NULL with PV_VOL_NO_MAP */
    pv_map_stats figures; /* of a map kept outside; changed under append_lock and state_lock */
    pv_superblock sb;
    _Atomic uint64_t dat_end; /* written under append_lock, read anywhere */
    _Atomic uint64_t idx_end;
} gen;

/* A change that waits for a flush; lives on its writer's stack and is linked and changed under append_lock. */
typedef struct pend {
    struct pend *next;
    pv_idx_row row; /* row.offset is the record's */
    uint64_t len;   /* of the record; 0: nothing was appended, the writer only waits for the flush */
    pv_entry prior; /* what the map says of the key */
    bool has_prior;
    bool row_written; /* .idx holds the row and something behind it */
    bool cut;         /* scratch of fail_through */
    bool resolved;
    int rc;
    pv_errinfo err;
} pend;

struct pv_vol {
    _Atomic uint32_t refs;

    /* fixed at open */
    uint32_t vid;
    uint32_t flags;
    uint8_t width;
    uint8_t version;
    bool has_ttl;
    size_t row_len;
    uint64_t max_bytes;

    pthread_mutex_t state_lock;
    pthread_cond_t state_cond; /* ops fell to 0, or closed was set */
    gen *gen;                  /* changed under append_lock and state_lock; NULL once closed */
    uint32_t ops;              /* calls that are running */
    bool closing;
    bool closed;
    pv_superblock last_sb; /* what a closed handle answers */
    pv_map_stats last_map;
    uint64_t last_dat_end;
    uint64_t last_idx_end;

    pthread_mutex_t append_lock;
    pthread_cond_t flush_cond; /* pending records were resolved, or flushing ended */
    pend *pend_head;           /* ascending offsets */
    pend *pend_tail;
    bool swapping;             /* a change of generation waits: nobody may join the pending records */
    bool flushing;             /* one thread flushes, with append_lock dropped */
    bool doubtful;             /* rows at the end of .idx may be taken back: their flush is under way */
    _Atomic bool flush_failed; /* once, ever; written under append_lock */
    bool torn;                 /* bytes behind dat_end or idx_end could not be cut off */
    uint64_t max_row_end;      /* furthest end of a record whose row was written since open */

    /* written under append_lock, read anywhere */
    _Atomic bool no_write;
    _Atomic bool no_delete;
    _Atomic uint64_t last_append_at_ns;
    _Atomic uint64_t last_modified_s;
    _Atomic uint64_t last_write_wall_s;

    _Atomic uint64_t eio_count;
    _Atomic uint64_t flush_count;
    _Atomic uint64_t flushed_records;
};

static inline uint64_t pv__load_u64(_Atomic uint64_t *p) {
    return atomic_load_explicit(p, memory_order_acquire);
}

static inline void pv__store_u64(_Atomic uint64_t *p, uint64_t value) {
    atomic_store_explicit(p, value, memory_order_release);
}

/* A running call, without a generation. PV_ECLOSED. */
int pv__vol_enter(pv_vol *v) PV_WUR;
void pv__vol_leave(pv_vol *v);
/* A running call with a reference on the generation; NULL once the handle is closed. */
gen *pv__gen_acquire(pv_vol *v) PV_WUR;
void pv__gen_release(pv_vol *v, gen *g);
/* Drops a reference that was taken with state_lock held, outside of a running call. */
void pv__gen_unref(pv_vol *v, gen *g);
/* Reads and parses one whole record, with the second try at +32 GiB of 4-byte volumes. On success free with pv_read_free. */
int pv__read_record(const pv_vol *v, gen *g, uint64_t offset, int32_t size, pv_read *out, pv_errinfo *err) PV_WUR;

#endif
