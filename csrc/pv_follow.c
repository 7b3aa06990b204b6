/* pv_follow.c - records of a data file as the messages that a follower of the volume gets, many in one call.
 *
 * A message is upstream's VolumeTailSenderResponse, fields in ascending order: the record's header, the rest of the record,
 * "this is the last piece", the volume's version. Works on a descriptor of its own; no locks, no memory of its own: what is
 * read lands at the upper end of the caller's buffer and moves down as it is framed.
 */
#include "pv_int.h"

#include <stdbool.h>

#define CHECKSUM_BYTES 4U
#define TIME_BYTES 8U
#define HEADER_KEY 0x0A /* field 1, bytes */
#define BODY_KEY 0x12   /* field 2, bytes */
#define LAST_KEY 0x18   /* field 3, varint */
#define VERSION_KEY 0x20
#define LENGTH_MAX 3U /* bytes of a body's length: below 2^21 */
/* What stands before the body: key, length and header; key and length of the body. */
#define BEFORE_MAX (2U + PV_NEEDLE_HEADER + 1U + LENGTH_MAX)
#define AFTER 4U
#define GROWTH ((size_t)PV_FOLLOW_GROWTH)

_Static_assert(PV_FOLLOW_GROWTH == BEFORE_MAX - PV_NEEDLE_HEADER + AFTER, "what frames a record beside its bytes");
_Static_assert(PV_FOLLOW_RECORD_MAX < 1U << (7 * LENGTH_MAX), "the length of a body fits its bytes");

static size_t put_length(uint8_t *p, size_t length) {
    size_t n = 0;
    for (; length > 0x7F; length >>= 7) {
        p[n++] = (uint8_t)(length & 0x7F) | 0x80;
    }
    p[n++] = (uint8_t)length;
    return n;
}

/* Frames a record at `record`, of which body bytes follow its header, at `to`; the two may overlap as long as `to` lies
 * GROWTH below. Returns the length. */
static size_t put_message(uint8_t *to, const uint8_t *record, size_t body, uint8_t version) {
    uint8_t before[BEFORE_MAX] = {HEADER_KEY, PV_NEEDLE_HEADER};
    memcpy(before + 2, record, PV_NEEDLE_HEADER);
    size_t n = 2 + PV_NEEDLE_HEADER;
    before[n++] = BODY_KEY;
    n += put_length(before + n, body);
    memmove(to + n, record + PV_NEEDLE_HEADER, body);
    memcpy(to, before, n);
    n += body;
    const uint8_t after[AFTER] = {LAST_KEY, 1, VERSION_KEY, version};
    memcpy(to + n, after, sizeof after);
    return n + sizeof after;
}

int pv_dat_follow(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, uint8_t *out, size_t cap,
                  uint32_t *ends, size_t max, uint64_t *last_append_ns, pv_errinfo *err) {
    pv__err_clear(err);
    if (version < 1 || version > 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    if (max == 0 || max > INT32_MAX / GROWTH || cap > UINT32_MAX || cap < max * GROWTH + PV_NEEDLE_HEADER) {
        return pv__fail(err, PV_EINVAL, cap, max, 0, 0);
    }
    if (*offset >= end_offset) {
        return 0;
    }
    uint8_t *held = out + max * GROWTH;
    size_t got = cap - max * GROWTH;
    if (got > end_offset - *offset) {
        got = (size_t)(end_offset - *offset);
    }
    size_t want = got;
    /* A bad sector further on does not take away what was read before it; who meets it tells. */
    (void)!pv__io_pread(fd, held, want, *offset, &got, NULL);
    const bool to_end = want == end_offset - *offset && got == want;
    const size_t tail = CHECKSUM_BYTES + (version == 3 ? TIME_BYTES : 0);
    size_t at = 0;
    size_t made = 0;
    uint32_t count = 0;
    while (count < max && got - at >= PV_NEEDLE_HEADER) {
        const uint8_t *record = held + at;
        uint32_t cookie;
        uint64_t id;
        int32_t size;
        pv_needle_header(record, &cookie, &id, &size);
        if (size < 0 || size > (int32_t)PV_FOLLOW_RECORD_MAX) {
            break;
        }
        size_t len = (size_t)pv_needle_record_len(size, version);
        size_t needed = PV_NEEDLE_HEADER + (size_t)size + tail;
        /* padding may be missing at the end, and nothing else */
        if (len > got - at && !(to_end && needed <= got - at)) {
            break;
        }
        size_t whole = len < got - at ? len : got - at;
        if (whole - PV_NEEDLE_HEADER > PV_FOLLOW_RECORD_MAX) {
            break;
        }
        if (version == 3) {
            uint64_t when = pv__get_be64(record + PV_NEEDLE_HEADER + (size_t)size + CHECKSUM_BYTES);
            if (when > *last_append_ns && (id != 0 || cookie != 0 || size != 0)) {
                *last_append_ns = when;
            }
        }
        if (id != 0 || cookie != 0 || size != 0) { /* a zero-filled region is no record */
            made += put_message(out + made, record, whole - PV_NEEDLE_HEADER, version);
            ends[count++] = (uint32_t)made;
        }
        at += whole;
        *offset += len;
    }
    return (int)count;
}
