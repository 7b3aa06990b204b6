/* Any bytes are packed; what comes out unpacks to them. */
#include "../pv_int.h"

#include <isa-l/igzip_lib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len > 1U << 20) {
        return 0;
    }
    size_t cap = 2 * len + 1024;
    size_t packed_len = 0;
    uint8_t *packed = malloc(cap);
    uint8_t *back = malloc(len + 1);
    if (packed != NULL && back != NULL) {
        if (pv_gzip_fast(data, len, packed, cap, &packed_len, NULL) != 0) {
            abort();
        }
        struct inflate_state state;
        isal_inflate_init(&state);
        state.crc_flag = ISAL_GZIP;
        state.next_in = packed;
        state.avail_in = (uint32_t)packed_len;
        state.next_out = back;
        state.avail_out = (uint32_t)(len + 1);
        if (isal_inflate(&state) != ISAL_DECOMP_OK || state.total_out != len || memcmp(back, data, len) != 0) {
            abort();
        }
    }
    free(packed);
    free(back);
    return 0;
}
