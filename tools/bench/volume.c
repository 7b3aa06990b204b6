/* volume - writes the files of a volume for measurements: <base>.dat and <base>.idx, version 3, 4-byte offsets.
 *
 *   volume BASE NEEDLES rising|shuffled MIN_BYTES MAX_BYTES GARBAGE_PERCENT whole|ends
 *
 * Needle i has a body of MIN_BYTES..MAX_BYTES pseudo-random bytes and cookie 0x01234567. Ids are 1..NEEDLES, rising or
 * shuffled in the order of the records. GARBAGE_PERCENT of the needles are deleted at the end, the last one never. With
 * `ends` only the first and last 1000 records are written and the rest of .dat is a hole: enough for a start, which reads
 * the index. Prints one line of JSON: last (id of the last needle's record), live, dat_bytes.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COOKIE = 0x01234567, WHOLE_ENDS = 1000, TOMBSTONE_BYTES = 32, BODY_MAX = 1 << 24 };

static uint32_t crc_table[256];
static uint64_t state = 88172645463325252ULL;

static uint64_t rnd(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void crc_init(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++) {
            c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
        }
        crc_table[i] = c;
    }
}

static uint32_t crc32c(const uint8_t *p, size_t len) {
    uint32_t c = ~0u;
    while (len-- > 0) {
        c = crc_table[(c ^ *p++) & 0xff] ^ c >> 8;
    }
    return ~c;
}

static uint8_t *put_be(uint8_t *to, uint64_t value, unsigned bytes) {
    for (unsigned i = 0; i < bytes; i++) {
        to[i] = (uint8_t)(value >> (8 * (bytes - 1 - i)));
    }
    return to + bytes;
}

static void write_row(FILE *idx, uint64_t key, uint64_t offset, int32_t size) {
    uint8_t row[16];
    put_be(put_be(put_be(row, key, 8), offset / 8, 4), (uint32_t)size, 4);
    if (fwrite(row, sizeof row, 1, idx) != 1) {
        die(".idx");
    }
}

static uint64_t record_len(uint64_t size) {
    uint64_t used = 16 + size + 4 + 8;
    return used + 8 - used % 8;
}

/* Header, body if there is data, checksum, time, padding. */
static void write_record(FILE *dat, uint64_t key, const uint8_t *body, uint32_t len, uint64_t at_ns) {
    uint8_t head[20];
    uint8_t tail[32] = {0};
    uint32_t size = len == 0 ? 0 : len + 5;
    uint8_t *h = put_be(put_be(put_be(head, COOKIE, 4), key, 8), size, 4);
    uint8_t *t = tail;
    if (len > 0) {
        h = put_be(h, len, 4);
        *t++ = 0;
    }
    t = put_be(t, len == 0 ? 0 : crc32c(body, len), 4);
    t = put_be(t, at_ns, 8);
    size_t tail_len = record_len(size) - (size_t)(h - head) - len;
    if (fwrite(head, (size_t)(h - head), 1, dat) != 1 || (len > 0 && fwrite(body, len, 1, dat) != 1) ||
        fwrite(tail, tail_len, 1, dat) != 1) {
        die(".dat");
    }
}

static FILE *create(const char *base, const char *extension) {
    char path[4096];
    snprintf(path, sizeof path, "%s%s", base, extension);
    FILE *f = fopen(path, "wbx");
    if (f == NULL) {
        die(path);
    }
    setvbuf(f, NULL, _IOFBF, 1 << 20);
    return f;
}

int main(int argc, char **argv) {
    if (argc != 8) {
        fprintf(stderr, "usage: volume BASE NEEDLES rising|shuffled MIN_BYTES MAX_BYTES GARBAGE_PERCENT whole|ends\n");
        return 2;
    }
    const uint64_t count = strtoull(argv[2], NULL, 10);
    const uint64_t min = strtoull(argv[4], NULL, 10);
    const uint64_t max = strtoull(argv[5], NULL, 10);
    const uint64_t garbage = strtoull(argv[6], NULL, 10);
    const int ends = strcmp(argv[7], "ends") == 0;
    if (count == 0 || count > UINT32_MAX || min == 0 || min > max || max > BODY_MAX || garbage > 100) {
        fprintf(stderr, "volume: a number is out of range\n");
        return 2;
    }
    crc_init();
    uint8_t *pool = malloc(2 * max);
    uint32_t *keys = malloc(count * sizeof *keys);
    if (pool == NULL || keys == NULL) {
        die("malloc");
    }
    for (uint64_t i = 0; i < 2 * max; i++) {
        pool[i] = (uint8_t)rnd();
    }
    for (uint64_t i = 0; i < count; i++) {
        keys[i] = (uint32_t)(i + 1);
    }
    for (uint64_t i = count - 1; i > 0 && strcmp(argv[3], "shuffled") == 0; i--) {
        uint64_t j = rnd() % (i + 1);
        uint32_t key = keys[i];
        keys[i] = keys[j];
        keys[j] = key;
    }
    FILE *dat = create(argv[1], ".dat");
    FILE *idx = create(argv[1], ".idx");
    const uint8_t super_block[8] = {3};
    if (fwrite(super_block, sizeof super_block, 1, dat) != 1) {
        die(".dat");
    }
    uint64_t at = sizeof super_block;
    uint64_t at_ns = 1700000000000000000ULL;
    for (uint64_t i = 0; i < count; i++) {
        uint32_t len = (uint32_t)(min + rnd() % (max - min + 1));
        if (!ends || i < WHOLE_ENDS || i + WHOLE_ENDS >= count) {
            if (ends && fseeko(dat, (off_t)at, SEEK_SET) != 0) {
                die(".dat");
            }
            write_record(dat, keys[i], pool + rnd() % (max + 1), len, ++at_ns);
        }
        write_row(idx, keys[i], at, (int32_t)(len + 5));
        at += record_len(len + 5);
    }
    uint64_t live = count;
    for (uint64_t i = 0; garbage > 0 && i + 1 < count; i++) {
        if (rnd() % 100 < garbage) {
            write_record(dat, keys[i], NULL, 0, ++at_ns);
            write_row(idx, keys[i], at, -1);
            at += TOMBSTONE_BYTES;
            live--;
        }
    }
    if (fclose(dat) != 0 || fclose(idx) != 0) {
        die("close");
    }
    printf("{\"last\": %llu, \"live\": %llu, \"dat_bytes\": %llu}\n", (unsigned long long)keys[count - 1],
           (unsigned long long)live, (unsigned long long)at);
    free(keys);
    free(pool);
    return 0;
}
