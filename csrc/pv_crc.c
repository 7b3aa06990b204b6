/* pv_crc.c - CRC-32C by ISA-L, and the stored form of old volumes. */
#include "pv_int.h"

#include <isa-l/crc.h>

/* ISA-L takes the length as an int. */
#define CRC_CHUNK ((size_t)1 << 30)

/* ISA-L continues the bare remainder; ours starts from all ones and inverts the result. */
uint32_t pv_crc32c(uint32_t prev, const void *buf, size_t len) {
    const uint8_t *p = buf;
    unsigned crc = ~prev;
    while (len > 0) {
        size_t n = len < CRC_CHUNK ? len : CRC_CHUNK;
        crc = crc32_iscsi((unsigned char *)(uintptr_t)p, (int)n, crc);
        p += n;
        len -= n;
    }
    return ~crc;
}

uint32_t pv_crc_legacy(uint32_t crc) {
    return ((crc >> 15) | (crc << 17)) + 0xa282ead8U;
}
