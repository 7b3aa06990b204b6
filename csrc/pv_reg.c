/* pv_reg.c - vid -> volume handle or shards, for lanes that must not ask Python which volumes there are.
 *
 * A hash table with open addressing and linear probing, at most half full, so a probe always ends at an empty slot. One
 * rwlock: taken shared to acquire, exclusively to publish and withdraw. Nothing is called with it that waits: a handle
 * is released (which may close its files) after the lock.
 */
#include "pv_int.h"

#include <stdbool.h>

#define SLOTS_MIN 64U
#define SLOTS_MAX (1U << 30)

typedef struct slot {
    pv_vol *v; /* this or that, neither: empty */
    pv_shards *shards;
    uint32_t vid;
    uint32_t flags; /* enum pv_reg_flag */
} slot;

struct pv_reg {
    pthread_rwlock_t lock;
    slot *slots;
    uint32_t mask; /* slots - 1, a power of two less one */
    uint32_t count;
};

/* Volume ids rise one by one; spreading them keeps runs short whatever ids a server happens to hold. */
static uint32_t home(uint32_t vid, uint32_t mask) {
    uint32_t h = vid * 0x9E3779B1U;
    return (h ^ (h >> 15)) & mask;
}

static bool is_used(const slot *s) {
    return s->v != NULL || s->shards != NULL;
}

/* The slot of vid, or the empty one where it would go. lock held. */
static uint32_t find(const slot *slots, uint32_t mask, uint32_t vid) {
    uint32_t i = home(vid, mask);
    while (is_used(&slots[i]) && slots[i].vid != vid) {
        i = (i + 1) & mask;
    }
    return i;
}

int pv_reg_new(pv_reg **out) {
    *out = NULL;
    pv_reg *r = pv__calloc(1, sizeof *r);
    slot *slots = pv__calloc(SLOTS_MIN, sizeof *slots);
    if (r == NULL || slots == NULL || pv__rwlock_init(&r->lock) < 0) {
        pv__free(r);
        pv__free(slots);
        return PV_ENOMEM;
    }
    r->slots = slots;
    r->mask = SLOTS_MIN - 1;
    *out = r;
    return 0;
}

void pv_reg_free(pv_reg *r) {
    if (r == NULL) {
        return;
    }
    for (uint32_t i = 0; i <= r->mask; i++) {
        pv_vol_unref(r->slots[i].v);
        pv_shards_unref(r->slots[i].shards);
    }
    pv__must(pthread_rwlock_destroy(&r->lock));
    pv__free(r->slots);
    pv__free(r);
}

/* lock held exclusively. On failure the table is as before. */
static int grow(pv_reg *r) {
    uint32_t size = r->mask + 1;
    if (size >= SLOTS_MAX) {
        return PV_ENOMEM;
    }
    slot *wider = pv__calloc((size_t)size * 2, sizeof *wider);
    if (wider == NULL) {
        return PV_ENOMEM;
    }
    uint32_t mask = size * 2 - 1;
    for (uint32_t i = 0; i < size; i++) {
        if (is_used(&r->slots[i])) {
            wider[find(wider, mask, r->slots[i].vid)] = r->slots[i];
        }
    }
    pv__free(r->slots);
    r->slots = wider;
    r->mask = mask;
    return 0;
}

int pv_reg_publish(pv_reg *r, uint32_t vid, pv_vol *v) {
    return pv_reg_publish_as(r, vid, v, 0);
}

/* Takes the references of `what` if it succeeds. */
static int publish(pv_reg *r, const slot *what) {
    int rc = 0;
    pv__wrlock(&r->lock);
    if ((r->count + 1) * 2 > r->mask + 1) {
        rc = grow(r);
    }
    if (rc == 0) {
        slot *s = &r->slots[find(r->slots, r->mask, what->vid)];
        if (is_used(s)) {
            rc = PV_EEXISTS;
        } else {
            *s = *what;
            r->count++;
        }
    }
    pv__rwunlock(&r->lock);
    return rc;
}

int pv_reg_publish_as(pv_reg *r, uint32_t vid, pv_vol *v, uint32_t flags) {
    if (v == NULL) {
        return PV_EINVAL;
    }
    const slot what = {.v = pv_vol_ref(v), .vid = vid, .flags = flags};
    int rc = publish(r, &what);
    if (rc < 0) {
        pv_vol_unref(v);
    }
    return rc;
}

int pv_reg_publish_shards(pv_reg *r, uint32_t vid, pv_shards *shards) {
    if (shards == NULL) {
        return PV_EINVAL;
    }
    const slot what = {.shards = pv_shards_ref(shards), .vid = vid};
    int rc = publish(r, &what);
    if (rc < 0) {
        pv_shards_unref(shards);
    }
    return rc;
}

/* Empties slot i and moves what was probed past it back, so that no probe ends too early. lock held exclusively. */
static void empty_slot(pv_reg *r, uint32_t i) {
    uint32_t j = i;
    for (;;) {
        j = (j + 1) & r->mask;
        if (!is_used(&r->slots[j])) {
            break;
        }
        uint32_t h = home(r->slots[j].vid, r->mask);
        bool reaches_i = ((j - h) & r->mask) >= ((j - i) & r->mask);
        if (reaches_i) {
            r->slots[i] = r->slots[j];
            i = j;
        }
    }
    r->slots[i] = (slot){0};
}

int pv_reg_withdraw(pv_reg *r, uint32_t vid) {
    pv__wrlock(&r->lock);
    uint32_t i = find(r->slots, r->mask, vid);
    const slot was = r->slots[i];
    if (is_used(&was)) {
        empty_slot(r, i);
        r->count--;
    }
    pv__rwunlock(&r->lock);
    pv_vol_unref(was.v);
    pv_shards_unref(was.shards);
    return is_used(&was) ? 0 : PV_ENOTFOUND;
}

pv_vol *pv_reg_acquire(pv_reg *r, uint32_t vid) {
    uint32_t flags;
    return pv_reg_acquire_as(r, vid, &flags);
}

pv_vol *pv_reg_acquire_as(pv_reg *r, uint32_t vid, uint32_t *flags) {
    pv__rdlock(&r->lock);
    const slot *s = &r->slots[find(r->slots, r->mask, vid)];
    pv_vol *v = s->v;
    *flags = s->flags;
    if (v != NULL) {
        v = pv_vol_ref(v);
    }
    pv__rwunlock(&r->lock);
    return v;
}

pv_shards *pv_reg_acquire_shards(pv_reg *r, uint32_t vid) {
    pv__rdlock(&r->lock);
    pv_shards *s = pv_shards_ref(r->slots[find(r->slots, r->mask, vid)].shards);
    pv__rwunlock(&r->lock);
    return s;
}

int pv_reg_count(pv_reg *r) {
    pv__rdlock(&r->lock);
    uint32_t count = r->count;
    pv__rwunlock(&r->lock);
    return (int)count;
}
