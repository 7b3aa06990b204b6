/* pv_map.c - the compact needle map: key -> (offset, size), in memory, ordered by key.
 *
 * Shape. Three levels: a growing array of inner nodes, inner nodes of up to FANOUT leaves, leaves of LEAF_BYTES each.
 * All leaves are equally long, so memory given up by one never has to be found a new use: there is no fragmentation,
 * and the peak during a load is what the loaded map needs.
 *
 * Leaf. A column of keys, then one of values (offset, size), all as narrow as the leaf's own entries allow: keys as
 * distance from the leaf's first key in 1..8 bytes, offsets (in units of 8 bytes) as distance from the smallest in 1..5
 * bytes, sizes signed in 1..4 bytes. Rising ids pack at 5 to 7 bytes, shuffled ones at 7 to 9. An entry that does not
 * fit makes its leaf be written anew with wider cells.
 *
 * Fill. A key above all others starts a new leaf when the last one is full, so leaves of rising ids are full. Elsewhere a
 * full leaf shares its entries with up to WINDOW - 1 neighbours, and only a window without room gets one leaf more:
 * such leaves are mostly between 8/9 and full, where plain splitting would leave them 2/3 full.
 *
 * Keys are never removed (a deleted one keeps its negated size, so that its bytes can still be read), so nothing merges.
 *
 * Locks: one rwlock per map, held shared by get, visit, stat, exclusively by put, delete, and by load for one batch of
 * rows at a time. With it held, only memory and the sorted file are asked for.
 */
#include "pv_int.h"

#include <endian.h>
#include <stdbool.h>

#define LEAF_BYTES 1024U
#define LEAF_HEAD 12U
#define LEAF_OVERREAD 8U /* offsets are loaded as 8 bytes, sizes as 4, whatever their width */
#define LEAF_ROOM (LEAF_BYTES - LEAF_HEAD - LEAF_OVERREAD)
#define LEAF_MAX (LEAF_ROOM / 3U)             /* entries with every cell 1 byte wide */
#define LEAF_MIN (LEAF_ROOM / (8U + 5U + 4U)) /* entries with every cell at its widest */
#define FANOUT 128U
#define WINDOW 8U
/* A window with 1/SLACK of its entries free is shared out instead of given another leaf: with less, the next insert would
 * soon be here again, asking for more would leave memory unused. */
#define SLACK 16U
/* Leaves packed to the left (at the right end of the map) keep 1/16 for keys that arrive late. */
#define PACK_NUM 15U
#define PACK_DEN 16U
#define SEGMENTS_MAX 64U

#define ARENA_CHUNK_MAX 4096U        /* leaves: 4 MiB */
#define ARENA_MMAP_MIN (64U * 1024U) /* bytes; smaller chunks come from malloc */

#define LOAD_ROWS 4096U
#define SAMPLES 32U /* places at which a load looks whether an index is in order */
#define SAMPLE_ROWS 1024U
#define SHUFFLED_SHARE 8U                /* more than an eighth below one before: they are not */
#define SHUFFLED_MIN ((uint64_t)1 << 18) /* rows left for which bringing them into order pays */
#define LOAD_AHEAD 6                     /* rows whose leaves are on their way from memory while one is applied */

#define CACHE_LINE 64U
#define PREFETCH_BYTES 256U

/* AddressSanitizer sees every overrun of a leaf only if each is an allocation of its own. */
#if defined(__SANITIZE_ADDRESS__)
#define SEPARATE_LEAVES 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SEPARATE_LEAVES 1
#endif
#endif
#ifndef SEPARATE_LEAVES
#define SEPARATE_LEAVES 0
#endif

typedef struct leaf {
    uint32_t base_lo; /* smallest offset of the leaf, in units of 8 bytes */
    uint8_t base_hi;
    uint8_t key_w;
    uint8_t offset_w;
    uint8_t size_w;
    uint16_t count;
    uint16_t cap;
    uint8_t cells[LEAF_ROOM + LEAF_OVERREAD];
} leaf;

_Static_assert(sizeof(leaf) == LEAF_BYTES, "leaves are as long as said");
_Static_assert(offsetof(leaf, cells) == LEAF_HEAD, "the head is as long as said");
/* An 8-byte load at the end of the key column stays within the values, one at the end of the values in the leaf. */
_Static_assert(LEAF_MIN >= 4 && LEAF_OVERREAD >= 8, "loads stay within their leaf");

/* keys[i] is the first key of leaves[i], and the base its stored keys count from. */
typedef struct inner {
    uint64_t keys[FANOUT];
    leaf *leaves[FANOUT];
    uint32_t count;
} inner;

typedef struct root_slot {
    uint64_t key; /* node->keys[0] */
    inner *node;
} root_slot;

typedef struct chunk {
    void *mem;
    size_t bytes; /* > 0: mapped with that length; 0: from malloc */
} chunk;

/* One entry outside of a leaf. */
typedef struct ent {
    uint64_t key;
    uint64_t units8;
    int32_t size;
} ent;

/* What a run of entries spans, and the cells it therefore needs. */
typedef struct shape {
    uint64_t key_first;
    uint64_t key_last;
    uint64_t offset_min;
    uint64_t offset_max;
    uint64_t base; /* what the stored offsets count from */
    uint32_t size_bits;
    uint8_t key_w;
    uint8_t offset_w;
    uint8_t size_w;
} shape;

/* Where a key is or would be. */
typedef struct spot {
    size_t root;
    unsigned slot;  /* leaf within the inner node */
    unsigned index; /* entry within the leaf */
    bool found;
} spot;

struct pv_map {
    pthread_rwlock_t lock;
    root_slot *root;
    size_t root_count;
    size_t root_cap;
    leaf *bump; /* next leaf of the newest chunk */
    size_t bump_left;
    leaf *spare; /* leaves out of use, linked through their cells */
    chunk *chunks;
    size_t chunk_count;
    size_t chunk_cap;
    size_t leaf_count;
    uint64_t units8_max;
    uint8_t width;
    pv__sorted *sorted; /* then the entries are in a file, and all the above is unused */
    pv_map_stats stats; /* memory_bytes is computed when asked for */
};

/* ------------------------------------------------------------------ cells of a leaf */

/* The low bytes of a little-endian load; index is a width 1..8. */
static const uint64_t width_mask[9] = {
    0, 0xff, 0xffff, 0xffffff, 0xffffffff, 0xffffffffff, 0xffffffffffff, 0xffffffffffffff, 0xffffffffffffffff,
};

static inline uint64_t load_wide(const uint8_t *p, uint64_t mask) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return le64toh(v) & mask;
}

/* Writes the bytes under mask and leaves those behind them as they are; v has no others. */
static inline void store_wide(uint8_t *p, uint64_t v, uint64_t mask) {
    uint64_t old;
    memcpy(&old, p, sizeof old);
    v = htole64((le64toh(old) & ~mask) | v);
    memcpy(p, &v, sizeof v);
}

static inline void store_size(uint8_t *p, uint32_t v, uint32_t mask) {
    uint32_t old;
    memcpy(&old, p, sizeof old);
    v = htole32((le32toh(old) & ~mask) | (v & mask));
    memcpy(p, &v, sizeof v);
}

static unsigned width_of(uint64_t v) {
    return v == 0 ? 1 : (unsigned)(71 - __builtin_clzll(v)) / 8;
}

/* Bytes for a signed value, given the OR of v ^ (v >> 31) over all values: one more bit than the magnitudes need. */
static unsigned size_width_of(uint32_t bits) {
    return width_of((uint64_t)bits << 1);
}

static uint32_t size_bits_of(int32_t size) {
    return (uint32_t)(size < 0 ? ~size : size);
}

static inline size_t value_w(const leaf *l) {
    return (size_t)l->offset_w + l->size_w;
}

static inline size_t value_at(const leaf *l, unsigned i) {
    return (size_t)l->cap * l->key_w + i * value_w(l);
}

static inline uint64_t leaf_base(const leaf *l) {
    return ((uint64_t)l->base_hi << 32) | l->base_lo;
}

static inline uint64_t key_at(const leaf *l, unsigned i) {
    return load_wide(l->cells + (size_t)i * l->key_w, width_mask[l->key_w]);
}

static inline uint64_t units8_at(const leaf *l, unsigned i) {
    return leaf_base(l) + load_wide(l->cells + value_at(l, i), width_mask[l->offset_w]);
}

static inline int32_t size_at(const leaf *l, unsigned i) {
    uint32_t v;
    memcpy(&v, l->cells + value_at(l, i) + l->offset_w, sizeof v);
    uint32_t sign = (uint32_t)1 << (8 * l->size_w - 1);
    v = le32toh(v) & (uint32_t)width_mask[l->size_w];
    return pv__i32((v ^ sign) - sign);
}

static inline void put_value(leaf *l, unsigned i, uint64_t units8, int32_t size) {
    uint8_t *p = l->cells + value_at(l, i);
    store_wide(p, units8 - leaf_base(l), width_mask[l->offset_w]);
    store_size(p + l->offset_w, (uint32_t)size, (uint32_t)width_mask[l->size_w]);
}

/* Whether the cells are wide enough for this value. */
static bool value_fits(const leaf *l, uint64_t units8, int32_t size) {
    uint64_t base = leaf_base(l);
    return units8 >= base && units8 - base <= width_mask[l->offset_w] && size_width_of(size_bits_of(size)) <= l->size_w;
}

/* First entry whose distance from the leaf's first key is not below delta. */
static unsigned lower_bound(const leaf *l, uint64_t delta) {
    const uint8_t *keys = l->cells;
    const size_t width = l->key_w;
    const uint64_t mask = width_mask[width];
    unsigned low = 0;
    unsigned n = l->count;
    while (n > 0) {
        unsigned half = n / 2;
        bool below = load_wide(keys + (low + half) * width, mask) < delta;
        low = below ? low + half + 1 : low;
        n = below ? n - half - 1 : half;
    }
    return low;
}

/* ------------------------------------------------------------------ runs of entries and their shape */

static unsigned shape_cap(const shape *s) {
    return LEAF_ROOM / ((unsigned)s->key_w + s->offset_w + s->size_w);
}

static inline void shape_begin(shape *s, const ent *e) {
    s->key_first = e->key;
    s->key_last = e->key;
    s->offset_min = e->units8;
    s->offset_max = e->units8;
    s->size_bits = size_bits_of(e->size);
}

static inline void shape_add(shape *s, const ent *e) {
    s->key_last = e->key;
    s->offset_min = e->units8 < s->offset_min ? e->units8 : s->offset_min;
    s->offset_max = e->units8 > s->offset_max ? e->units8 : s->offset_max;
    s->size_bits |= size_bits_of(e->size);
}

static inline void shape_finish(shape *s) {
    unsigned absolute = width_of(s->offset_max);
    unsigned relative = width_of(s->offset_max - s->offset_min);
    s->key_w = (uint8_t)width_of(s->key_last - s->key_first);
    s->size_w = (uint8_t)size_width_of(s->size_bits);
    s->offset_w = (uint8_t)relative;
    /* Where a base saves nothing, 0 is the better one: no smaller offset can ever come. */
    s->base = absolute == relative ? 0 : s->offset_min;
}

static void shape_of(const ent *e, unsigned n, shape *s) {
    shape_begin(s, e);
    for (unsigned i = 1; i < n; i++) {
        shape_add(s, &e[i]);
    }
    shape_finish(s);
}

/* Writes a run, which fits, into a leaf. Column by column and from the left, so that each store may spill to its right. */
static void leaf_encode(leaf *l, const ent *e, unsigned n, const shape *s) {
    l->base_lo = (uint32_t)s->base;
    l->base_hi = (uint8_t)(s->base >> 32);
    l->key_w = s->key_w;
    l->offset_w = s->offset_w;
    l->size_w = s->size_w;
    l->count = (uint16_t)n;
    l->cap = (uint16_t)shape_cap(s);
    uint8_t *p = l->cells;
    for (unsigned i = 0; i < n; i++, p += s->key_w) {
        uint64_t v = htole64(e[i].key - s->key_first);
        memcpy(p, &v, sizeof v);
    }
    p = l->cells + value_at(l, 0);
    for (unsigned i = 0; i < n; i++) {
        uint64_t v = htole64(e[i].units8 - s->base);
        uint32_t size = htole32((uint32_t)e[i].size);
        memcpy(p, &v, sizeof v);
        memcpy(p + s->offset_w, &size, sizeof size);
        p += value_w(l);
    }
}

/* Inserts e before index; it fits and there is room. */
static void leaf_insert(leaf *l, unsigned index, const ent *e, uint64_t first) {
    size_t behind = l->count - index;
    uint8_t *keys = l->cells + (size_t)index * l->key_w;
    uint8_t *values = l->cells + value_at(l, index);
    memmove(keys + l->key_w, keys, behind * l->key_w);
    memmove(values + value_w(l), values, behind * value_w(l));
    store_wide(keys, e->key - first, width_mask[l->key_w]);
    put_value(l, index, e->units8, e->size);
    l->count++;
}

static void leaf_decode(leaf *l, uint64_t first, ent *out) {
    for (unsigned i = 0; i < l->count; i++) {
        out[i].key = first + key_at(l, i);
        out[i].units8 = units8_at(l, i);
        out[i].size = size_at(l, i);
    }
}

/* Puts e at index, over the entry there or before it. Returns the new count. */
static unsigned run_merge(ent *run, unsigned n, unsigned index, bool replace, const ent *e) {
    if (!replace) {
        memmove(run + index + 1, run + index, (n - index) * sizeof *run);
        n++;
    }
    run[index] = *e;
    return n;
}

/* Cuts n entries into segments of equal count. cut[i] is where segment i begins, cut[segments] == n. */
static bool cut_evenly(const ent *e, unsigned n, unsigned segments, unsigned *cut, shape *shapes) {
    for (unsigned i = 0; i < segments; i++) {
        cut[i] = (unsigned)((uint64_t)n * i / segments);
        cut[i + 1] = (unsigned)((uint64_t)n * (i + 1) / segments);
        shape_of(e + cut[i], cut[i + 1] - cut[i], &shapes[i]);
        if (cut[i + 1] - cut[i] > shape_cap(&shapes[i])) {
            return false;
        }
    }
    return true;
}

/* Cuts into segments as long as they may be, from the left. Returns how many. A segment ends only when it holds at least
 * LEAF_MIN * 15/16 entries, which bounds their number. */
static unsigned cut_greedily(const ent *e, unsigned n, unsigned *cut, shape *shapes) {
    unsigned segments = 0;
    unsigned at = 0;
    while (at < n && segments < SEGMENTS_MAX) {
        unsigned begin = at;
        shape s;
        shape_begin(&s, &e[at]);
        shape_finish(&s);
        for (at++; at < n; at++) {
            shape wider = s;
            shape_add(&wider, &e[at]);
            shape_finish(&wider);
            if (at + 1 - begin > shape_cap(&wider) * PACK_NUM / PACK_DEN) {
                break;
            }
            s = wider;
        }
        cut[segments] = begin;
        shapes[segments] = s;
        segments++;
    }
    cut[segments] = at;
    return segments;
}

_Static_assert((WINDOW * LEAF_MAX + 1) / (LEAF_MIN * PACK_NUM / PACK_DEN) + 1 < SEGMENTS_MAX, "a window's cuts fit");

/* ------------------------------------------------------------------ memory for leaves */

static int arena_grow(pv_map *m) {
    if (m->chunk_count == m->chunk_cap) {
        size_t cap = m->chunk_cap == 0 ? 8 : m->chunk_cap * 2;
        chunk *chunks = pv__realloc(m->chunks, cap, sizeof *chunks);
        if (chunks == NULL) {
            return PV_ENOMEM;
        }
        m->chunks = chunks;
        m->chunk_cap = cap;
    }
    /* A quarter of what is there: small maps stay small, big ones have few chunks. Pages not yet used cost nothing. */
    size_t leaves = m->leaf_count / 4;
    leaves = leaves < 1 ? 1 : leaves > ARENA_CHUNK_MAX ? ARENA_CHUNK_MAX : leaves;
    if (SEPARATE_LEAVES) {
        leaves = 1;
    }
    chunk c = {.mem = NULL, .bytes = leaves * LEAF_BYTES};
    if (c.bytes >= ARENA_MMAP_MIN) {
        c.mem = pv__pages(c.bytes);
    } else {
        c.mem = pv__malloc(c.bytes);
        c.bytes = 0;
    }
    if (c.mem == NULL) {
        return PV_ENOMEM;
    }
    m->chunks[m->chunk_count++] = c;
    m->bump = c.mem;
    m->bump_left = leaves;
    return 0;
}

static leaf *leaf_new(pv_map *m) {
    leaf *l = m->spare;
    if (l != NULL) {
        memcpy(&m->spare, l->cells, sizeof m->spare);
        return l;
    }
    if (m->bump_left == 0 && arena_grow(m) < 0) {
        return NULL;
    }
    m->bump_left--;
    m->leaf_count++;
    return m->bump++;
}

static void leaf_give_back(pv_map *m, leaf *l) {
    memcpy(l->cells, &m->spare, sizeof m->spare);
    m->spare = l;
}

/* ------------------------------------------------------------------ directory */

/* Inserts an inner node at position at of the root. */
static int root_insert(pv_map *m, size_t at, inner *node) {
    if (m->root_count == m->root_cap) {
        size_t cap = m->root_cap == 0 ? 4 : m->root_cap + m->root_cap / 2;
        root_slot *root = pv__realloc(m->root, cap, sizeof *root);
        if (root == NULL) {
            return PV_ENOMEM;
        }
        m->root = root;
        m->root_cap = cap;
    }
    memmove(m->root + at + 1, m->root + at, (m->root_count - at) * sizeof *m->root);
    m->root[at].key = node->keys[0];
    m->root[at].node = node;
    m->root_count++;
    return 0;
}

/* Splits an inner node. The last one of the map, if full, gives away little: what comes behind it will fill the new one. */
static int inner_split(pv_map *m, size_t r) {
    inner *left = m->root[r].node;
    inner *right = pv__malloc(sizeof *right);
    if (right == NULL) {
        return PV_ENOMEM;
    }
    bool full_last = r + 1 == m->root_count && left->count == FANOUT;
    unsigned keep = full_last ? FANOUT - WINDOW : left->count / 2;
    unsigned moved = left->count - keep;
    memcpy(right->keys, left->keys + keep, moved * sizeof *right->keys);
    memcpy(right->leaves, left->leaves + keep, moved * sizeof *right->leaves);
    right->count = moved;
    int rc = root_insert(m, r + 1, right);
    if (rc < 0) {
        pv__free(right);
        return rc;
    }
    left->count = keep;
    return 0;
}

/* Last inner node that begins at or before key, or the first. The map is not empty. */
static size_t root_find(const pv_map *m, uint64_t key) {
    const root_slot *root = m->root;
    size_t low = 0;
    size_t n = m->root_count;
    if (key >= root[n - 1].key) {
        return n - 1;
    }
    while (n > 1) {
        size_t half = n / 2;
        low = root[low + half].key <= key ? low + half : low;
        n -= half;
    }
    return low;
}

/* The same for the leaves of an inner node. */
static unsigned inner_find(const inner *node, uint64_t key) {
    const uint64_t *keys = node->keys;
    unsigned low = 0;
    unsigned n = node->count;
    if (key >= keys[n - 1]) {
        return n - 1;
    }
    while (n > 1) {
        unsigned half = n / 2;
        low = keys[low + half] <= key ? low + half : low;
        n -= half;
    }
    return low;
}

/* Asks for a leaf's head and most of its keys at once, instead of waiting for each line as a search comes to it. */
static inline void leaf_prefetch(const leaf *l) {
    for (size_t line = 0; line < PREFETCH_BYTES; line += CACHE_LINE) {
        __builtin_prefetch((const uint8_t *)l + line);
    }
}

/* Finds a key or its place. The map is not empty. Needs the lock in either mode. */
static leaf *find(const pv_map *m, uint64_t key, spot *at) {
    at->root = root_find(m, key);
    const inner *node = m->root[at->root].node;
    at->slot = inner_find(node, key);
    leaf *l = node->leaves[at->slot];
    leaf_prefetch(l);
    uint64_t first = node->keys[at->slot];
    if (key < first) {
        at->index = 0;
        at->found = false;
        return l;
    }
    at->index = lower_bound(l, key - first);
    at->found = at->index < l->count && key_at(l, at->index) == key - first;
    return l;
}

/* Sets the first key of a leaf, here and, if it is the node's first, in the root. */
static void set_first_key(pv_map *m, size_t r, unsigned slot, uint64_t key) {
    m->root[r].node->keys[slot] = key;
    if (slot == 0) {
        m->root[r].key = key;
    }
}

/* ------------------------------------------------------------------ changing
 * All of these need the lock exclusively, and leave the map as it was when they fail. */

/* Adds a leaf that holds only e, whose key is above all others. */
static int append_leaf(pv_map *m, const ent *e) {
    leaf *l = leaf_new(m);
    if (l == NULL) {
        return PV_ENOMEM;
    }
    inner *node = m->root_count == 0 ? NULL : m->root[m->root_count - 1].node;
    if (node == NULL || node->count == FANOUT) {
        node = pv__malloc(sizeof *node);
        if (node == NULL) {
            leaf_give_back(m, l);
            return PV_ENOMEM;
        }
        node->count = 0;
        node->keys[0] = e->key;
        int rc = root_insert(m, m->root_count, node);
        if (rc < 0) {
            pv__free(node);
            leaf_give_back(m, l);
            return rc;
        }
    }
    shape s;
    shape_of(e, 1, &s);
    leaf_encode(l, e, 1, &s);
    node->keys[node->count] = e->key;
    node->leaves[node->count] = l;
    node->count++;
    return 0;
}

/* Writes a run over the leaves [low, low + had) of an inner node, with leaves added or given up behind them. */
static int write_segments(pv_map *m, size_t r, unsigned low, unsigned had, const ent *run, const unsigned *cut,
                          const shape *shapes, unsigned segments) {
    inner *node = m->root[r].node;
    leaf *fresh[SEGMENTS_MAX];
    for (unsigned i = had; i < segments; i++) {
        fresh[i] = leaf_new(m);
        if (fresh[i] == NULL) {
            while (i > had) {
                leaf_give_back(m, fresh[--i]);
            }
            return PV_ENOMEM;
        }
    }
    for (unsigned i = segments; i < had; i++) {
        leaf_give_back(m, node->leaves[low + i]);
    }
    unsigned behind = node->count - (low + had);
    memmove(node->keys + low + segments, node->keys + low + had, behind * sizeof *node->keys);
    memmove(node->leaves + low + segments, node->leaves + low + had, behind * sizeof *node->leaves);
    node->count = low + segments + behind;
    for (unsigned i = 0; i < segments; i++) {
        if (i >= had) {
            node->leaves[low + i] = fresh[i];
        }
        leaf_encode(node->leaves[low + i], run + cut[i], cut[i + 1] - cut[i], &shapes[i]);
        set_first_key(m, r, low + i, run[cut[i]].key);
    }
    return 0;
}

/* A run of neighbouring leaves in one inner node. */
typedef struct window {
    unsigned low;
    unsigned count;
    unsigned free; /* entries its leaves could still take */
} window;

/* Makes the window one leaf wider, on the side that has more room. False if it cannot grow. */
static bool window_widen(const inner *node, window *w) {
    bool can_left = w->low > 0;
    bool can_right = w->low + w->count < node->count;
    if (w->count == WINDOW || (!can_left && !can_right)) {
        return false;
    }
    unsigned left = can_left ? (unsigned)(node->leaves[w->low - 1]->cap - node->leaves[w->low - 1]->count) : 0;
    unsigned right =
        can_right ? (unsigned)(node->leaves[w->low + w->count]->cap - node->leaves[w->low + w->count]->count) : 0;
    if (!can_right || (can_left && left > right)) {
        w->low--;
        w->free += left;
    } else {
        w->free += right;
    }
    w->count++;
    return true;
}

/* Decodes the leaves of a window with e merged in, which belongs to leaf slot at index. Returns the count. */
static unsigned window_decode(const inner *node, const window *w, const spot *at, const ent *e, ent *run) {
    unsigned n = 0;
    for (unsigned i = w->low; i < w->low + w->count; i++) {
        leaf *l = node->leaves[i];
        leaf_decode(l, node->keys[i], run + n);
        n += i == at->slot ? run_merge(run + n, l->count, at->index, at->found, e) : l->count;
    }
    return n;
}

/* Puts e, which its leaf cannot take, by sharing with neighbours or with new leaves. run has room for a whole window.
 * PV_EMORE: the inner node must be split first. */
static int spread(pv_map *m, const spot *at, const ent *e, ent *run) {
    const inner *node = m->root[at->root].node;
    const leaf *l = node->leaves[at->slot];
    const bool last_node = at->root + 1 == m->root_count;
    unsigned cut[SEGMENTS_MAX + 1];
    shape shapes[SEGMENTS_MAX];
    unsigned n;
    unsigned segments;
    window w = {.low = at->slot, .count = 1, .free = (unsigned)(l->cap - l->count)};
    /* At the right end of the map more keys will come behind, so entries are packed to the left there, and the last leaf
     * is continued in a new one instead of pushing its neighbours about. */
    bool alone = last_node && at->slot + 1 == node->count;
    bool packs = alone;
    while (!alone && window_widen(node, &w)) {
        packs = last_node && w.low + w.count == node->count;
        if (w.free < w.count * l->cap / SLACK) {
            continue;
        }
        n = window_decode(node, &w, at, e, run);
        segments = w.count;
        bool fits;
        if (packs) {
            segments = cut_greedily(run, n, cut, shapes);
            fits = segments <= w.count;
        } else {
            fits = cut_evenly(run, n, segments, cut, shapes);
        }
        if (fits) {
            return write_segments(m, at->root, w.low, w.count, run, cut, shapes, segments);
        }
    }
    n = window_decode(node, &w, at, e, run);
    segments = w.count + 1;
    if (packs || !cut_evenly(run, n, segments, cut, shapes)) {
        segments = cut_greedily(run, n, cut, shapes);
    }
    if (node->count - w.count + segments > FANOUT) {
        return PV_EMORE;
    }
    return write_segments(m, at->root, w.low, w.count, run, cut, shapes, segments);
}

/* Sets a key to a value its leaf cannot take as it is. PV_EMORE as above. */
static int set_slow(pv_map *m, const spot *at, const ent *e) {
    inner *node = m->root[at->root].node;
    leaf *l = node->leaves[at->slot];
    uint64_t first = node->keys[at->slot];
    bool last = at->root + 1 == m->root_count && at->slot + 1 == node->count;
    bool cells_fit = e->key >= first && e->key - first <= width_mask[l->key_w] && value_fits(l, e->units8, e->size);
    if (!cells_fit) {
        ent run[LEAF_MAX + 1];
        leaf_decode(l, first, run);
        unsigned n = run_merge(run, l->count, at->index, at->found, e);
        shape s;
        shape_of(run, n, &s);
        if (n <= shape_cap(&s)) {
            leaf_encode(l, run, n, &s);
            set_first_key(m, at->root, at->slot, run[0].key);
            return 0;
        }
    }
    if (last && at->index == l->count) {
        return append_leaf(m, e);
    }
    ent *run = pv__malloc((WINDOW * LEAF_MAX + 1) * sizeof *run);
    if (run == NULL) {
        return PV_ENOMEM;
    }
    int rc = spread(m, at, e, run);
    pv__free(run);
    return rc;
}

/* Sets a key without counting. *old: what was there; old->size and units8 0, *found false if nothing. */
static int set(pv_map *m, const ent *e, ent *old, bool *found) {
    *old = (ent){.key = e->key};
    *found = false;
    if (m->root_count == 0) {
        return append_leaf(m, e);
    }
    /* Each turn but the last halves an inner node. */
    for (;;) {
        spot at;
        leaf *l = find(m, e->key, &at);
        if (at.found) {
            *found = true;
            old->units8 = units8_at(l, at.index);
            old->size = size_at(l, at.index);
            if (value_fits(l, e->units8, e->size)) {
                put_value(l, at.index, e->units8, e->size);
                return 0;
            }
        } else {
            uint64_t first = m->root[at.root].node->keys[at.slot];
            if (l->count < l->cap && e->key >= first && e->key - first <= width_mask[l->key_w] &&
                value_fits(l, e->units8, e->size)) {
                leaf_insert(l, at.index, e, first);
                return 0;
            }
        }
        int rc = set_slow(m, &at, e);
        if (rc != PV_EMORE) {
            return rc;
        }
        rc = inner_split(m, at.root);
        if (rc < 0) {
            return rc;
        }
    }
}

/* Negates the size of a key, without counting. False if the key is unknown. *old: its size before. */
static bool negate(pv_map *m, uint64_t key, int32_t *old) {
    *old = 0;
    if (m->root_count == 0) {
        return false;
    }
    spot at;
    leaf *l = find(m, key, &at);
    if (!at.found) {
        return false;
    }
    *old = size_at(l, at.index);
    if (*old >= 0) {
        /* A cell wide enough for a size is so for its negation, and every cell for -1. */
        put_value(l, at.index, units8_at(l, at.index), *old == 0 ? -1 : -*old);
    }
    return true;
}

/* ------------------------------------------------------------------ the public side */

int pv_map_new(uint8_t width, pv_map **out) {
    *out = NULL;
    if (width != 4 && width != 5) {
        return PV_EINVAL;
    }
    pv_map *m = pv__calloc(1, sizeof *m);
    if (m == NULL) {
        return PV_ENOMEM;
    }
    int rc = pv__rwlock_init(&m->lock);
    if (rc < 0) {
        pv__free(m);
        return rc;
    }
    m->width = width;
    m->units8_max = width_mask[width];
    *out = m;
    return 0;
}

void pv_map_free(pv_map *m) {
    if (m == NULL) {
        return;
    }
    pv__must(pthread_rwlock_destroy(&m->lock));
    pv__sorted_close(m->sorted);
    for (size_t i = 0; i < m->root_count; i++) {
        pv__free(m->root[i].node);
    }
    for (size_t i = 0; i < m->chunk_count; i++) {
        if (m->chunks[i].bytes > 0) {
            pv__pages_free(m->chunks[i].mem, m->chunks[i].bytes);
        } else {
            pv__free(m->chunks[i].mem);
        }
    }
    pv__free(m->root);
    pv__free(m->chunks);
    pv__free(m);
}

int pv_map_open_sorted(uint8_t width, const char *sdx_path, int idx_fd, pv_map **out, pv_errinfo *err) {
    int rc = pv_map_new(width, out);
    if (rc < 0) {
        return pv__fail(err, rc, 0, 0, 0, 0);
    }
    rc = pv__sorted_open(sdx_path, idx_fd, width, &(*out)->sorted, &(*out)->stats, err);
    if (rc < 0) {
        pv_map_free(*out);
        *out = NULL;
    }
    return rc;
}

static int map_get(pv_map *m, uint64_t key, bool cached, uint64_t *offset, int32_t *size) {
    int rc = PV_ENOTFOUND;
    pv__rdlock(&m->lock);
    if (m->sorted != NULL) {
        rc = pv__sorted_get(m->sorted, key, cached, offset, size);
    } else if (m->root_count > 0) {
        spot at;
        leaf *l = find(m, key, &at);
        if (at.found) {
            *offset = units8_at(l, at.index) * 8;
            *size = size_at(l, at.index);
            rc = 0;
        }
    }
    pv__rwunlock(&m->lock);
    return rc;
}

int pv_map_get(pv_map *m, uint64_t key, uint64_t *offset, int32_t *size) {
    return map_get(m, key, false, offset, size);
}

int pv__map_get_cached(pv_map *m, uint64_t key, uint64_t *offset, int32_t *size) {
    return map_get(m, key, true, offset, size);
}

/* Counters of a running volume: an overwrite counts as a deletion only if the old needle had a body. */
int pv_map_put(pv_map *m, uint64_t key, uint64_t offset, int32_t size, uint64_t *old_offset, int32_t *old_size) {
    const ent e = {.key = key, .units8 = offset / 8, .size = size};
    *old_offset = 0;
    *old_size = 0;
    if (size < 0 || m->sorted != NULL) {
        return PV_EINVAL;
    }
    if (e.units8 > m->units8_max) {
        return PV_ERANGE;
    }
    ent old;
    bool found;
    pv__wrlock(&m->lock);
    int rc = set(m, &e, &old, &found);
    if (rc == 0) {
        m->stats.entries += !found;
        m->stats.file_count++;
        m->stats.file_bytes += (uint32_t)size;
        if (old.size > 0) {
            m->stats.deleted_count++;
            m->stats.deleted_bytes += (uint32_t)old.size;
        }
        if (key > m->stats.max_key) {
            m->stats.max_key = key;
        }
        *old_offset = old.units8 * 8;
        *old_size = old.size;
    }
    pv__rwunlock(&m->lock);
    return rc;
}

int pv_map_delete(pv_map *m, uint64_t key, int32_t *old_size) {
    pv__wrlock(&m->lock);
    if (m->sorted != NULL) {
        int rc = pv__sorted_delete(m->sorted, key, old_size);
        pv__rwunlock(&m->lock);
        return rc;
    }
    bool known = negate(m, key, old_size);
    if (*old_size > 0) {
        m->stats.deleted_count++;
        m->stats.deleted_bytes += (uint32_t)*old_size;
    }
    pv__rwunlock(&m->lock);
    return known ? 0 : PV_ENOTFOUND;
}

/* Counters of a load: every tombstone row counts as a deletion, and so does an overwrite of an empty file. */
static int apply_row(pv_map *m, const pv_idx_row *row) {
    if (row->offset != 0 && row->size >= 0) {
        const ent e = {.key = row->key, .units8 = row->offset / 8, .size = row->size};
        ent old;
        bool found;
        int rc = set(m, &e, &old, &found);
        if (rc < 0) {
            return rc;
        }
        m->stats.entries += !found;
        m->stats.file_count++;
        m->stats.file_bytes += (uint32_t)row->size;
        if (old.units8 != 0 && old.size >= 0) {
            m->stats.deleted_count++;
            m->stats.deleted_bytes += (uint32_t)old.size;
        }
    } else {
        int32_t old_size;
        (void)negate(m, row->key, &old_size);
        m->stats.deleted_count++;
        m->stats.deleted_bytes += old_size > 0 ? (uint32_t)old_size : 0U;
    }
    if (row->key > m->stats.max_key) {
        m->stats.max_key = row->key;
    }
    return 0;
}

/* Puts rows of needles into the last leaf for as long as their keys rise above all others and they fit, and counts them.
 * Returns how many. The map is not empty. */
static size_t append_rows(pv_map *m, const pv_idx_row *rows, size_t count) {
    const inner *node = m->root[m->root_count - 1].node;
    leaf *l = node->leaves[node->count - 1];
    const uint64_t first = node->keys[node->count - 1];
    const uint64_t base = leaf_base(l);
    const size_t key_w = l->key_w;
    const size_t offset_w = l->offset_w;
    const size_t size_w = l->size_w;
    uint8_t *key = l->cells + l->count * key_w;
    uint8_t *value = l->cells + value_at(l, l->count);
    uint64_t max_key = m->stats.max_key;
    size_t n = 0;
    count = count < (size_t)(l->cap - l->count) ? count : (size_t)(l->cap - l->count);
    for (; n < count; n++) {
        const pv_idx_row *row = &rows[n];
        const uint64_t units8 = row->offset / 8;
        if (row->key <= max_key || units8 == 0 || row->size < 0 || row->key - first > width_mask[key_w] ||
            units8 < base || units8 - base > width_mask[offset_w] || size_width_of((uint32_t)row->size) > size_w) {
            break;
        }
        store_wide(key, row->key - first, width_mask[key_w]);
        store_wide(value, units8 - base, width_mask[offset_w]);
        store_size(value + offset_w, (uint32_t)row->size, (uint32_t)width_mask[size_w]);
        key += key_w;
        value += offset_w + size_w;
        max_key = row->key;
        m->stats.file_bytes += (uint32_t)row->size;
    }
    l->count = (uint16_t)(l->count + n);
    m->stats.max_key = max_key;
    m->stats.entries += n;
    m->stats.file_count += n;
    return n;
}

int pv__map_apply(pv_map *m, const pv_idx_row *rows, size_t count, uint64_t *done) {
    int rc = 0;
    pv__wrlock(&m->lock);
    for (size_t i = 0; i < count && rc >= 0;) {
        if (m->root_count > 0 && rows[i].key > m->stats.max_key) {
            size_t put = append_rows(m, rows + i, count - i);
            i += put;
            *done += put;
            if (put > 0) {
                continue;
            }
        }
        /* Keys above all others go to the last leaf, which is here. */
        if (m->root_count > 0 && i + LOAD_AHEAD < count && rows[i + LOAD_AHEAD].key <= m->stats.max_key) {
            const inner *node = m->root[root_find(m, rows[i + LOAD_AHEAD].key)].node;
            leaf_prefetch(node->leaves[inner_find(node, rows[i + LOAD_AHEAD].key)]);
        }
        rc = apply_row(m, &rows[i]);
        *done += rc >= 0;
        i++;
    }
    pv__rwunlock(&m->lock);
    return rc;
}

/* Whether many rows have a key below one before them, going by samples from all over the file: 1 or 0. */
static int is_shuffled(int fd, uint8_t width, uint64_t first_row, uint64_t count, pv_idx_row *rows, pv_errinfo *err) {
    uint64_t key_max = 0;
    uint64_t late = 0;
    uint64_t seen = 0;
    for (uint64_t i = 0; i < SAMPLES; i++) {
        int got = pv_idx_read(fd, width, first_row + count / SAMPLES * i, rows, SAMPLE_ROWS, err);
        if (got < 0) {
            return got;
        }
        for (int j = 0; j < got; j++) {
            late += rows[j].key < key_max;
            key_max = rows[j].key > key_max ? rows[j].key : key_max;
        }
        seen += (uint64_t)got;
    }
    return late > seen / SHUFFLED_SHARE;
}

static int load_in_order(pv_map *m, int fd, uint64_t first_row, uint64_t max_rows, pv_idx_row *rows,
                         uint64_t *rows_done, pv_errinfo *err) {
    while (*rows_done < max_rows) {
        size_t want = max_rows - *rows_done < LOAD_ROWS ? (size_t)(max_rows - *rows_done) : LOAD_ROWS;
        int rc = pv_idx_read(fd, m->width, first_row + *rows_done, rows, want, err);
        if (rc < 0) {
            return rc;
        }
        size_t count = (size_t)rc;
        rc = pv__map_apply(m, rows, count, rows_done);
        if (rc < 0) {
            return pv__fail(err, rc, *rows_done, 0, 0, 0);
        }
        if (count < want) {
            break;
        }
    }
    return 0;
}

int pv__map_load_rows(pv_map *m, int fd, uint64_t first_row, uint64_t max_rows, uint64_t *rows_done, pv_errinfo *err) {
    *rows_done = 0;
    if (m->sorted != NULL) {
        return pv__fail(err, PV_EINVAL, 0, 0, 0, 0);
    }
    uint64_t file_bytes;
    int rc = pv__io_size(fd, &file_bytes, err);
    if (rc < 0) {
        return rc;
    }
    pv_idx_row *rows = pv__malloc(LOAD_ROWS * sizeof *rows);
    if (rows == NULL) {
        return pv__fail(err, PV_ENOMEM, 0, 0, 0, 0);
    }
    uint64_t count = file_bytes / (12U + m->width);
    count = count > first_row ? count - first_row : 0;
    count = count < max_rows ? count : max_rows;
    /* Rising keys in the middle of a map find full leaves everywhere: only an empty one takes them fast. */
    if (m->root_count == 0 && count >= SHUFFLED_MIN && count <= PV__SHUFFLED_ROWS_MAX) {
        rc = is_shuffled(fd, m->width, first_row, count, rows, err);
    }
    bool in_order = rc == 0;
    if (rc > 0) {
        rc = pv__map_load_shuffled(m, fd, m->width, first_row, count, err);
        *rows_done = rc == 0 ? count : 0;
        in_order = rc == PV_ENOMEM && m->root_count == 0; /* that needs no memory but the map's */
    }
    if (in_order) {
        pv__err_clear(err);
        rc = load_in_order(m, fd, first_row, max_rows, rows, rows_done, err);
    }
    pv__free(rows);
    return rc;
}

int pv_map_load(pv_map *m, int fd, uint64_t first_row, uint64_t *rows_done, pv_errinfo *err) {
    return pv__map_load_rows(m, fd, first_row, UINT64_MAX, rows_done, err);
}

void pv__map_count_files(pv_map *m, uint64_t more) {
    pv__wrlock(&m->lock);
    m->stats.file_count += more;
    pv__rwunlock(&m->lock);
}

int pv_map_visit(pv_map *m, uint64_t from, pv_idx_row *rows, size_t max) {
    int count = 0;
    const int limit = max > INT32_MAX ? INT32_MAX : (int)max;
    pv__rdlock(&m->lock);
    if (m->sorted != NULL) {
        count = pv__sorted_visit(m->sorted, from, rows, (size_t)limit);
    } else if (m->root_count > 0) {
        spot at;
        (void)find(m, from, &at);
        unsigned i = at.index;
        unsigned slot = at.slot;
        for (size_t r = at.root; r < m->root_count && count < limit; r++) {
            const inner *node = m->root[r].node;
            for (; slot < node->count && count < limit; slot++) {
                leaf *l = node->leaves[slot];
                for (; i < l->count && count < limit; i++) {
                    rows[count].key = node->keys[slot] + key_at(l, i);
                    rows[count].offset = units8_at(l, i) * 8;
                    rows[count].size = size_at(l, i);
                    rows[count].reserved = 0;
                    count++;
                }
                i = 0;
            }
            slot = 0;
        }
    }
    pv__rwunlock(&m->lock);
    return count;
}

void pv_map_stat(pv_map *m, pv_map_stats *out) {
    pv__rdlock(&m->lock);
    *out = m->stats;
    out->memory_bytes = sizeof *m + m->leaf_count * LEAF_BYTES + m->root_count * sizeof(inner) +
                        m->root_cap * sizeof *m->root + m->chunk_cap * sizeof *m->chunks +
                        (m->sorted != NULL ? pv__sorted_memory(m->sorted) : 0);
    pv__rwunlock(&m->lock);
}
