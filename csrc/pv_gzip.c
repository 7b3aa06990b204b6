/* pv_gzip.c - gzip at the fast level that upstream packs uploads with, so that what is stored is the same here and there.
 *
 * A needle's ETag and checksum are those of its stored bytes. If two servers pack the same upload differently, replicas,
 * retries and comparisons see two contents; with this encoder they see one. It is therefore bound to its choices:
 *   - blocks of 65,535 bytes; matches of four bytes and more by one hash table, found with growing steps while there are none
 *   - one dynamic Huffman code for each block, or literals alone if matches save less than 1/16, or the bytes as they are if the
 *     code saves less than 1/16 (the extra bits of matches are not counted in that, a quirk)
 *   - code lengths limited by package-merge, packages before leaves of the same weight; canonical codes
 *   - an empty stored block at the end
 * RFC 1951 and 1952 describe the format. No state between calls.
 */
#include "pv_int.h"

#include <isa-l/crc.h>
#include <stdbool.h>

#define BLOCK 65535U
#define SMALL_BLOCK 128U /* a last block below this is not searched for matches */
#define STORED_BLOCK 16U /* and one up to this is stored */
#define TABLE_BITS 14U
#define DISTANCE_MAX 32768U
#define MATCH_MIN 4U /* found by the table; the format would take 3 */
#define MATCH_MAX 258U
#define MARGIN 15U /* the end of a block is not searched */

#define LITERALS 286U
#define DISTANCES 30U
#define LENGTH_CODES 19U
#define END_OF_BLOCK 256U
#define CODE_BITS_MAX 15U

#define TOKEN_MATCH 0x80000000U

typedef struct slot {
    uint32_t val; /* four bytes */
    uint32_t at;  /* position + 1; 0: none */
} slot;

typedef struct code {
    uint16_t bits; /* reversed, as they go out */
    uint16_t len;
} code;

typedef struct packer {
    uint8_t *out;
    size_t cap;
    size_t len;
    bool full;
    uint64_t acc;
    unsigned acc_bits;
    slot table[1U << TABLE_BITS];
    uint32_t tokens[BLOCK + 1];
    uint32_t lit_freq[LITERALS];
    uint32_t dist_freq[DISTANCES];
    uint32_t len_freq[LENGTH_CODES];
    code lit[LITERALS];
    code dist[DISTANCES];
    code lens[LENGTH_CODES];
    uint8_t runs[LITERALS + DISTANCES + 1]; /* code lengths as run lengths: a symbol, and for 16..18 its count */
    size_t run_count;
} packer;

static const uint8_t length_extra[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                       2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
static const uint8_t length_order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

/* ------------------------------------------------------------------ bits */

static void put_byte(packer *p, uint8_t byte) {
    if (p->len < p->cap) {
        p->out[p->len++] = byte;
    } else {
        p->full = true;
    }
}

static void put_bits(packer *p, uint32_t bits, unsigned count) {
    p->acc |= (uint64_t)bits << p->acc_bits;
    p->acc_bits += count;
    while (p->acc_bits >= 8) {
        put_byte(p, (uint8_t)p->acc);
        p->acc >>= 8;
        p->acc_bits -= 8;
    }
}

static void put_code(packer *p, code c) {
    put_bits(p, c.bits, c.len);
}

static void align(packer *p) {
    if (p->acc_bits > 0) {
        put_bits(p, 0, 8 - p->acc_bits);
    }
}

static void put_stored(packer *p, const uint8_t *data, size_t len, bool last) {
    put_bits(p, last, 3);
    align(p);
    put_bits(p, (uint32_t)len, 16);
    put_bits(p, (uint32_t)len ^ 0xffffU, 16);
    if (len > p->cap - p->len) {
        p->full = true;
    } else if (len > 0) {
        memcpy(p->out + p->len, data, len);
        p->len += len;
    }
}

/* ------------------------------------------------------------------ codes */

typedef struct weighed {
    uint32_t freq;
    uint16_t symbol;
} weighed;

static int by_freq(const void *a, const void *b) {
    const weighed *x = a;
    const weighed *y = b;
    if (x->freq != y->freq) {
        return x->freq < y->freq ? -1 : 1;
    }
    return (x->symbol > y->symbol) - (x->symbol < y->symbol);
}

/* How many of n >= 3 leaves, ascending by weight, get each length: counts[1..limit]. Package-merge: the list of each level is
 * the leaves merged with pairs of the level below. Of the top level 2n - 2 items are taken, and what they are made of. */
static void count_lengths(const weighed *leaves, unsigned n, unsigned limit, uint32_t *counts) {
    uint64_t lower[2 * LITERALS];
    uint64_t here[2 * LITERALS];
    uint16_t leaves_in[CODE_BITS_MAX + 1][2 * LITERALS + 1]; /* among the first i items of a level */
    size_t lower_len = 0;
    for (unsigned level = 1; level <= limit; level++) {
        size_t leaf = 0;
        size_t pair = 0;
        size_t len = 0;
        leaves_in[level][0] = 0;
        while (leaf < n || pair < lower_len / 2) {
            uint64_t weight = pair < lower_len / 2 ? lower[2 * pair] + lower[2 * pair + 1] : UINT64_MAX;
            bool is_leaf = leaf < n && leaves[leaf].freq < weight;
            here[len] = is_leaf ? leaves[leaf].freq : weight;
            leaf += is_leaf;
            pair += !is_leaf;
            len++;
            leaves_in[level][len] = (uint16_t)leaf;
            if (len == 2 * (size_t)n - 2) {
                break; /* more is never asked for */
            }
        }
        memcpy(lower, here, len * sizeof *here);
        lower_len = len;
    }
    size_t take = 2 * (size_t)n - 2;
    uint32_t longer = 0; /* leaves that are at least so long */
    uint32_t at_least[CODE_BITS_MAX + 2] = {0};
    for (unsigned level = limit, bits = 1; level > 0; level--, bits++) {
        uint32_t used = leaves_in[level][take];
        at_least[bits] = used;
        take = 2 * (take - used);
    }
    for (unsigned bits = limit; bits > 0; bits--) {
        counts[bits] = at_least[bits] - longer;
        longer = at_least[bits];
    }
}

static uint16_t reversed(uint32_t bits, unsigned len) {
    uint32_t r = 0;
    for (unsigned i = 0; i < len; i++) {
        r |= ((bits >> i) & 1U) << (len - 1 - i);
    }
    return (uint16_t)r;
}

/* A code for these weights; symbols without weight get length 0. */
static void make_code(const uint32_t *freq, unsigned symbols, unsigned limit, code *out) {
    weighed list[LITERALS];
    unsigned n = 0;
    for (unsigned i = 0; i < symbols; i++) {
        out[i] = (code){0, 0};
        if (freq[i] != 0) {
            list[n++] = (weighed){freq[i], (uint16_t)i};
        }
    }
    if (n <= 2) {
        for (unsigned i = 0; i < n; i++) {
            out[list[i].symbol] = (code){(uint16_t)i, 1};
        }
        return;
    }
    qsort(list, n, sizeof *list, by_freq);
    uint32_t counts[CODE_BITS_MAX + 1] = {0};
    limit = limit < n - 1 ? limit : n - 1;
    count_lengths(list, n, limit, counts);
    unsigned left = n;
    for (unsigned len = 1; len <= limit; len++) { /* the heaviest get the shortest */
        for (uint32_t i = 0; i < counts[len]; i++) {
            out[list[--left].symbol].len = (uint16_t)len;
        }
    }
    uint32_t next = 0;
    for (unsigned len = 1; len <= limit; len++) {
        next <<= 1;
        for (unsigned i = 0; i < symbols; i++) {
            if (out[i].len == len) {
                out[i].bits = reversed(next++, len);
            }
        }
    }
}

static uint64_t bits_of(const uint32_t *freq, const code *codes, unsigned symbols) {
    uint64_t total = 0;
    for (unsigned i = 0; i < symbols; i++) {
        total += (uint64_t)freq[i] * codes[i].len;
    }
    return total;
}

static void put_run(packer *p, unsigned symbol, unsigned count) {
    p->runs[p->run_count++] = (uint8_t)symbol;
    p->len_freq[symbol]++;
    if (symbol >= 16) {
        p->runs[p->run_count++] = (uint8_t)count;
    }
}

/* The lengths of both codes, one after the other, as run lengths. */
static void make_runs(packer *p, unsigned literals, unsigned distances) {
    uint8_t lens[LITERALS + DISTANCES];
    unsigned total = literals + distances;
    for (unsigned i = 0; i < total; i++) {
        lens[i] = (uint8_t)(i < literals ? p->lit[i].len : p->dist[i - literals].len);
    }
    memset(p->len_freq, 0, sizeof p->len_freq);
    p->run_count = 0;
    for (unsigned i = 0; i < total;) {
        unsigned len = lens[i];
        unsigned count = 1;
        while (i + count < total && lens[i + count] == len) {
            count++;
        }
        i += count;
        if (len != 0) {
            put_run(p, len, 0);
            count--;
            while (count >= 3) {
                unsigned n = count < 6 ? count : 6;
                put_run(p, 16, n - 3);
                count -= n;
            }
        } else {
            while (count >= 11) {
                unsigned n = count < 138 ? count : 138;
                put_run(p, 18, n - 11);
                count -= n;
            }
            if (count >= 3) {
                put_run(p, 17, count - 3);
                count = 0;
            }
        }
        while (count-- > 0) {
            put_run(p, len, 0);
        }
    }
    make_code(p->len_freq, LENGTH_CODES, 7, p->lens);
}

/* Bits of the block without the extra bits of its matches. */
static uint64_t coded_size(const packer *p, unsigned *length_codes) {
    unsigned n = LENGTH_CODES;
    while (n > 4 && p->len_freq[length_order[n - 1]] == 0) {
        n--;
    }
    *length_codes = n;
    return 3 + 5 + 5 + 4 + 3 * (uint64_t)n + bits_of(p->len_freq, p->lens, LENGTH_CODES) + p->len_freq[16] * 2U +
           p->len_freq[17] * 3U + p->len_freq[18] * 7U + bits_of(p->lit_freq, p->lit, LITERALS) +
           bits_of(p->dist_freq, p->dist, DISTANCES);
}

static void put_header(packer *p, unsigned literals, unsigned distances, unsigned length_codes) {
    put_bits(p, 4, 3);
    put_bits(p, literals - 257, 5);
    put_bits(p, distances - 1, 5);
    put_bits(p, length_codes - 4, 4);
    for (unsigned i = 0; i < length_codes; i++) {
        put_bits(p, p->lens[length_order[i]].len, 3);
    }
    for (size_t i = 0; i < p->run_count; i++) {
        unsigned symbol = p->runs[i];
        put_code(p, p->lens[symbol]);
        if (symbol >= 16) {
            put_bits(p, p->runs[++i], symbol == 16 ? 2 : symbol == 17 ? 3 : 7);
        }
    }
}

static bool better_stored(size_t len, uint64_t bits) {
    return (uint64_t)(len + 5) * 8 < bits + (bits >> 4);
}

/* ------------------------------------------------------------------ blocks */

/* Code of a match length - 3, and what the code's range begins with. */
static unsigned length_code(uint32_t xlength, uint32_t *base) {
    uint32_t at = 0;
    unsigned c = 0;
    if (xlength == 255) {
        *base = 255;
        return 28;
    }
    while (at + (1U << length_extra[c]) <= xlength) {
        at += 1U << length_extra[c];
        c++;
    }
    *base = at;
    return c;
}

/* Code of a distance - 1; it has code / 2 - 1 extra bits, none below 4. */
static unsigned distance_code(uint32_t xdistance, uint32_t *base) {
    if (xdistance < 4) {
        *base = xdistance;
        return xdistance;
    }
    unsigned high = 31U - (unsigned)__builtin_clz(xdistance);
    unsigned half = (xdistance >> (high - 1)) & 1U;
    *base = (2U + half) << (high - 1);
    return 2 * high + half;
}

static void put_literals_only(packer *p, const uint8_t *data, size_t len) {
    unsigned length_codes;
    memset(p->lit_freq, 0, sizeof p->lit_freq);
    for (size_t i = 0; i < len; i++) {
        p->lit_freq[data[i]]++;
    }
    p->lit_freq[END_OF_BLOCK] = 1;
    memset(p->dist_freq, 0, sizeof p->dist_freq);
    p->dist_freq[0] = 1; /* a code of one distance, which is not used */
    make_code(p->lit_freq, LITERALS, CODE_BITS_MAX, p->lit);
    make_code(p->dist_freq, DISTANCES, CODE_BITS_MAX, p->dist);
    make_runs(p, END_OF_BLOCK + 1, 1);
    if (better_stored(len, coded_size(p, &length_codes))) {
        put_stored(p, data, len, false);
        return;
    }
    put_header(p, END_OF_BLOCK + 1, 1, length_codes);
    for (size_t i = 0; i < len; i++) {
        put_code(p, p->lit[data[i]]);
    }
    put_code(p, p->lit[END_OF_BLOCK]);
}

static void put_tokens(packer *p, size_t count, const uint8_t *data, size_t len) {
    unsigned length_codes;
    uint32_t base;
    p->tokens[count++] = END_OF_BLOCK;
    memset(p->lit_freq, 0, sizeof p->lit_freq);
    memset(p->dist_freq, 0, sizeof p->dist_freq);
    for (size_t i = 0; i < count; i++) {
        uint32_t t = p->tokens[i];
        if (t & TOKEN_MATCH) {
            p->lit_freq[257 + length_code((t >> 16) & 0xffU, &base)]++;
            p->dist_freq[distance_code(t & 0x7fffU, &base)]++;
        } else {
            p->lit_freq[t]++;
        }
    }
    unsigned literals = LITERALS;
    while (p->lit_freq[literals - 1] == 0) {
        literals--;
    }
    unsigned distances = DISTANCES;
    while (distances > 0 && p->dist_freq[distances - 1] == 0) {
        distances--;
    }
    if (distances == 0) {
        p->dist_freq[0] = 1;
        distances = 1;
    }
    make_code(p->lit_freq, LITERALS, CODE_BITS_MAX, p->lit);
    make_code(p->dist_freq, DISTANCES, CODE_BITS_MAX, p->dist);
    make_runs(p, literals, distances);
    if (better_stored(len, coded_size(p, &length_codes))) {
        put_stored(p, data, len, false);
        return;
    }
    put_header(p, literals, distances, length_codes);
    for (size_t i = 0; i < count; i++) {
        uint32_t t = p->tokens[i];
        if (!(t & TOKEN_MATCH)) {
            put_code(p, p->lit[t]);
            continue;
        }
        uint32_t xlength = (t >> 16) & 0xffU;
        unsigned c = length_code(xlength, &base);
        put_code(p, p->lit[257 + c]);
        put_bits(p, xlength - base, length_extra[c]);
        c = distance_code(t & 0x7fffU, &base);
        put_code(p, p->dist[c]);
        put_bits(p, (t & 0x7fffU) - base, c < 4 ? 0 : c / 2 - 1);
    }
}

/* ------------------------------------------------------------------ matches */

static uint32_t load32(const uint8_t *b) {
    return b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
}

static slot *slot_of(packer *p, uint32_t val) {
    return &p->table[(val * 0x1e35a7bdU) >> (32 - TABLE_BITS)];
}

static bool matches(slot found, uint32_t val, size_t at) {
    return found.at != 0 && found.val == val && at - (found.at - 1) <= DISTANCE_MAX;
}

/* The block in[begin, end) as tokens. Positions are those of the whole input: matches reach back over blocks. */
static size_t find_matches(packer *p, const uint8_t *in, size_t begin, size_t end) {
    size_t count = 0;
    size_t emitted = begin;
    size_t limit = end - MARGIN;
    size_t at = begin;
    uint32_t val = load32(in + at);
    for (;;) {
        size_t next = at;
        uint32_t skip = 32; /* the step grows by one for every 32 positions that were looked at in vain */
        slot found;
        for (;;) {
            at = next;
            next = at + (skip >> 5);
            skip += skip >> 5;
            if (next > limit) {
                goto rest;
            }
            slot *s = slot_of(p, val);
            found = *s;
            *s = (slot){val, (uint32_t)at + 1};
            if (matches(found, val, at)) {
                break;
            }
            val = load32(in + next);
        }
        while (emitted < at) {
            p->tokens[count++] = in[emitted++];
        }
        for (;;) {
            size_t from = found.at - 1;
            size_t longest = end - at < MATCH_MAX ? end - at : MATCH_MAX;
            size_t len = MATCH_MIN;
            while (len < longest && in[from + len] == in[at + len]) {
                len++;
            }
            p->tokens[count++] = TOKEN_MATCH | (uint32_t)(len - 3) << 16 | (uint32_t)(at - from - 1);
            at += len;
            emitted = at;
            if (at >= limit) {
                goto rest;
            }
            uint32_t before = load32(in + at - 1);
            *slot_of(p, before) = (slot){before, (uint32_t)at};
            val = load32(in + at);
            slot *s = slot_of(p, val);
            found = *s;
            *s = (slot){val, (uint32_t)at + 1};
            if (!matches(found, val, at)) {
                at++;
                val = load32(in + at);
                break;
            }
        }
    }
rest:
    while (emitted < end) {
        p->tokens[count++] = in[emitted++];
    }
    return count;
}

int pv_gzip_fast(const uint8_t *in, size_t len, uint8_t *out, size_t cap, size_t *out_len, pv_errinfo *err) {
    static const uint8_t head[] = {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 0xff};
    *out_len = 0;
    if (len > UINT32_MAX - 1) {
        return pv__fail(err, PV_EINVAL, len, 0, 0, 0);
    }
    packer *p = pv__malloc(sizeof *p);
    if (p == NULL) {
        return pv__fail(err, PV_ENOMEM, sizeof *p, 0, 0, 0);
    }
    p->out = out;
    p->cap = cap;
    p->len = 0;
    p->full = false;
    p->acc = 0;
    p->acc_bits = 0;
    memset(p->table, 0, sizeof p->table);
    for (size_t i = 0; i < sizeof head; i++) {
        put_byte(p, head[i]);
    }
    for (size_t at = 0; at < len && !p->full;) {
        size_t n = len - at < BLOCK ? len - at : BLOCK;
        if (n <= STORED_BLOCK) {
            put_stored(p, in + at, n, false);
        } else if (n < SMALL_BLOCK) {
            put_literals_only(p, in + at, n);
        } else {
            size_t count = find_matches(p, in, at, at + n);
            if (count > n - (n >> 4)) {
                put_literals_only(p, in + at, n);
            } else {
                put_tokens(p, count, in + at, n);
            }
        }
        at += n;
    }
    put_stored(p, NULL, 0, true);
    uint32_t crc = crc32_gzip_refl(0, in, len);
    for (unsigned i = 0; i < 4; i++) {
        put_byte(p, (uint8_t)(crc >> (8 * i)));
    }
    for (unsigned i = 0; i < 4; i++) {
        put_byte(p, (uint8_t)(len >> (8 * i)));
    }
    bool full = p->full;
    *out_len = p->len;
    pv__free(p);
    return full ? pv__fail(err, PV_EBUFFER, cap, 0, 0, 0) : 0;
}
