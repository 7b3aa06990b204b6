/* The gzip encoder: what it makes unpacks to what went in, and never goes beyond its buffer. */
#include "t.h"

#include <isa-l/igzip_lib.h>

static void fill(uint8_t *buf, size_t len, int kind, uint64_t *seed) {
    for (size_t i = 0; i < len; i++) {
        uint64_t r = t_rand(seed);
        switch (kind) {
        case 0:
            buf[i] = (uint8_t)r;
            break;
        case 1:
            buf[i] = 0;
            break;
        case 2:
            buf[i] = (uint8_t)('a' + r % 4);
            break;
        case 3: /* runs copied from before */
            buf[i] = i > 100 && r % 50 != 0 ? buf[i - 1 - (i / 1000) % 90] : (uint8_t)r;
            break;
        default:
            buf[i] = (uint8_t)("volume needle cookie offset\n"[(i * 7 + (i >> 6)) % 28]);
        }
    }
}

static void check(const uint8_t *in, size_t len, uint8_t *packed, size_t cap, uint8_t *back) {
    size_t packed_len;
    CHECK_EQ(pv_gzip_fast(in, len, packed, cap, &packed_len, NULL), 0);
    struct inflate_state state;
    isal_inflate_init(&state);
    state.crc_flag = ISAL_GZIP;
    state.next_in = packed;
    state.avail_in = (uint32_t)packed_len;
    state.next_out = back;
    state.avail_out = (uint32_t)(len + 1);
    CHECK_EQ(isal_inflate(&state), ISAL_DECOMP_OK);
    CHECK_EQ(state.total_out, len);
    CHECK_EQ(state.avail_in, 0);
    CHECK_MEM(in, back, len);
    if (packed_len < 3000) { /* each shorter buffer is refused without a byte behind it */
        t_guard g = t_guard_new(packed_len + 1);
        static const uint8_t none[4096];
        for (size_t n = 0; n < packed_len; n++) {
            size_t got;
            uint8_t *out = t_guard_put(&g, none, n);
            CHECK_EQ(pv_gzip_fast(in, len, out, n, &got, NULL), PV_EBUFFER);
        }
        t_guard_free(&g);
    }
}

static void it_unpacks_to_what_went_in(void) {
    static const size_t sizes[] = {0,   1,    15,    16,    17,    100,   127,   128,    129,
                                   255, 1000, 65534, 65535, 65536, 65551, 65552, 131070, 200000};
    uint64_t seed = 5;
    const size_t most = 200000;
    uint8_t *packed = malloc(2 * most + 1024);
    uint8_t *back = malloc(most + 1);
    t_guard g = t_guard_new(most);
    uint8_t *buf = malloc(most);
    CHECK(packed != NULL && back != NULL && buf != NULL);
    for (int kind = 0; kind < 5; kind++) {
        for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
            fill(buf, sizes[i], kind, &seed);
            check(t_guard_put(&g, buf, sizes[i]), sizes[i], packed, 2 * sizes[i] + 1024, back);
        }
    }
    t_guard_free(&g);
    free(buf);
    free(packed);
    free(back);
}

static void the_worst_weights_keep_their_codes_in_limits(void) {
    /* Fibonacci weights make the longest codes a tree could have */
    static uint8_t buf[60000];
    static uint8_t packed[130000];
    static uint8_t back[60001];
    size_t len = 0;
    size_t a = 1;
    size_t b = 1;
    for (unsigned symbol = 0; len + a <= sizeof buf; symbol++) {
        for (size_t i = 0; i < a; i++) {
            buf[len++] = (uint8_t)symbol;
        }
        size_t next = a + b;
        a = b;
        b = next;
    }
    uint64_t seed = 9;
    for (size_t i = len - 1; i > 0; i--) { /* shuffled, so that there are no matches */
        size_t j = t_rand_below(&seed, i + 1);
        uint8_t x = buf[i];
        buf[i] = buf[j];
        buf[j] = x;
    }
    check(buf, len, packed, sizeof packed, back);
}

int main(void) {
    RUN(it_unpacks_to_what_went_in);
    RUN(the_worst_weights_keep_their_codes_in_limits);
    return T_END();
}
