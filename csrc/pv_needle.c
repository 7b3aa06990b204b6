/* pv_needle.c - needle records of versions 1 to 3 and the super block, on buffers. No I/O, no allocation.
 *
 * Record:  header 16 (cookie 4, id 8, size 4) | body, size bytes | checksum 4 | version 3: append time 8 | padding 1..8
 * Body:    version 1: the data. Versions 2 and 3: nothing if there is no data, else
 *          data size 4 | data | flags 1 | name 1+n | mime 1+n | last modified 5 | ttl 2 | pairs 2+n, as the flags say
 */
#include "pv_int.h"

#define CHECKSUM_BYTES 4
#define TIME_BYTES 8
#define DATA_SIZE_BYTES 4
#define LAST_MODIFIED_BYTES 5
#define TTL_BYTES 2
#define PAIRS_SIZE_BYTES 2
#define PADDING_UNIT 8
#define PADDING_MAX 8

/* A body may be this long, so that the 32-bit arithmetic of other implementations on whole records does not overflow. */
#define BODY_MAX (INT32_MAX - PV_NEEDLE_HEADER - CHECKSUM_BYTES - TIME_BYTES - PADDING_MAX)

_Static_assert(1 + (1 + UINT8_MAX) + (1 + UINT8_MAX) + LAST_MODIFIED_BYTES + TTL_BYTES + PAIRS_SIZE_BYTES + UINT16_MAX +
                       CHECKSUM_BYTES + TIME_BYTES + PADDING_MAX <=
                   PV_NEEDLE_TAIL_MAX,
               "the longest tail fits its documented bound");

/* Numbers of the fields in PV_ECORRUPT, from the contract's table. */
enum field { FIELD_DATA = 1, FIELD_NAME, FIELD_MIME, FIELD_MTIME, FIELD_TTL, FIELD_PAIRS_SIZE, FIELD_PAIRS };

static int version_ok(uint8_t version) {
    return version >= 1 && version <= 3;
}

static int has_time(uint8_t version) {
    return version == 3;
}

/* Bytes behind the body without the padding. */
static size_t tail_bytes(uint8_t version) {
    return CHECKSUM_BYTES + (has_time(version) ? TIME_BYTES : 0);
}

/* 1..8 for any size a record can have. The sum wraps at 32 bits and % truncates toward zero, as upstream's do, so a
 * hostile negative size gives the same odd lengths. */
static int32_t padding_bytes(int32_t size, uint8_t version) {
    int32_t used = pv__i32((uint32_t)size + PV_NEEDLE_HEADER + (uint32_t)tail_bytes(version));
    return PADDING_UNIT - used % PADDING_UNIT;
}

int64_t pv_needle_record_len(int32_t size, uint8_t version) {
    return (int64_t)PV_NEEDLE_HEADER + size + (int64_t)tail_bytes(version) + padding_bytes(size, version);
}

void pv_needle_header(const uint8_t *buf16, uint32_t *cookie, uint64_t *id, int32_t *size) {
    *cookie = pv__get_be32(buf16);
    *id = pv__get_be64(buf16 + 4);
    *size = pv__i32(pv__get_be32(buf16 + 12));
}

/* Parses flags..pairs out of len bytes. A body that ends where an optional field would begin is fine: fields were added
 * over the years. */
static int parse_fields(const uint8_t *p, size_t len, pv_needle *n, pv_errinfo *err) {
    size_t at = 0;
    if (at < len) {
        n->flags = p[at++];
    }
    if (at < len && (n->flags & PV_F_NAME)) {
        n->name_size = p[at++];
        if (n->name_size > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_NAME, 0, n->id, 0);
        }
        n->name = p + at;
        at += n->name_size;
    }
    if (at < len && (n->flags & PV_F_MIME)) {
        n->mime_size = p[at++];
        if (n->mime_size > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_MIME, 0, n->id, 0);
        }
        n->mime = p + at;
        at += n->mime_size;
    }
    if (at < len && (n->flags & PV_F_MTIME)) {
        if (LAST_MODIFIED_BYTES > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_MTIME, 0, n->id, 0);
        }
        n->last_modified_s = pv__get_be40(p + at);
        at += LAST_MODIFIED_BYTES;
    }
    if (at < len && (n->flags & PV_F_TTL)) {
        if (TTL_BYTES > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_TTL, 0, n->id, 0);
        }
        n->ttl_count = p[at];
        n->ttl_unit = p[at + 1];
        at += TTL_BYTES;
    }
    if (at < len && (n->flags & PV_F_PAIRS)) {
        if (PAIRS_SIZE_BYTES > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_PAIRS_SIZE, 0, n->id, 0);
        }
        n->pairs_size = pv__get_be16(p + at);
        at += PAIRS_SIZE_BYTES;
        if (n->pairs_size > len - at) {
            return pv__fail(err, PV_ECORRUPT, FIELD_PAIRS, 0, n->id, 0);
        }
        n->pairs = p + at;
    }
    return 0;
}

int pv_needle_parse(const uint8_t *buf, size_t len, uint8_t version, int32_t expected_size, uint64_t offset,
                    uint32_t flags, pv_needle *out, pv_errinfo *err) {
    memset(out, 0, sizeof *out);
    if (!version_ok(version)) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    if (len < PV_NEEDLE_HEADER) {
        return pv__fail(err, PV_EEOF, offset, PV_NEEDLE_HEADER, len, 0);
    }
    out->version = version;
    pv_needle_header(buf, &out->cookie, &out->id, &out->size);
    if (!(flags & PV_PARSE_ANY_SIZE) && out->size != expected_size) {
        return pv__fail(err, PV_ESIZE, offset, out->id, (uint32_t)out->size, (uint64_t)(int64_t)expected_size);
    }
    if (out->size < 0) {
        return pv__fail(err, PV_ECORRUPT, FIELD_DATA, 0, out->id, 0);
    }
    size_t size = (size_t)out->size;
    size_t wanted = PV_NEEDLE_HEADER + size + tail_bytes(version);
    if (len < wanted) {
        return pv__fail(err, PV_EEOF, offset, wanted, len, 0);
    }
    const uint8_t *body = buf + PV_NEEDLE_HEADER;
    out->data = body;
    if (version == 1) {
        out->data_size = (uint32_t)size;
    } else if (size > 0) {
        if (size < DATA_SIZE_BYTES) {
            return pv__fail(err, PV_ECORRUPT, FIELD_DATA, 0, out->id, 0);
        }
        uint32_t data_size = pv__get_be32(body);
        if (data_size > size - DATA_SIZE_BYTES) {
            return pv__fail(err, PV_ECORRUPT, FIELD_DATA, 0, out->id, 0);
        }
        out->data = body + DATA_SIZE_BYTES;
        out->data_size = data_size;
        int rc = parse_fields(out->data + data_size, size - DATA_SIZE_BYTES - data_size, out, err);
        if (rc < 0) {
            return rc;
        }
    }
    const uint8_t *tail = body + size;
    uint32_t stored = pv__get_be32(tail);
    if (has_time(version)) {
        out->append_at_ns = pv__get_be64(tail + CHECKSUM_BYTES);
    }
    out->checksum = stored;
    if (version != 1 && size > DATA_SIZE_BYTES && out->data_size == 0 &&
        (out->flags == 0 || (stored != 0 && stored != pv_crc_legacy(0) && !(flags & PV_PARSE_NO_CRC)))) {
        /* Zeros, as a lost page leaves them. Nobody writes a body without data, and the checksum is of some. */
        return pv__fail(err, PV_ECORRUPT, FIELD_DATA, 0, out->id, 0);
    }
    if (out->data_size > 0 && !(flags & PV_PARSE_NO_CRC)) {
        uint32_t computed = pv_crc32c(0, out->data, out->data_size);
        out->checksum = computed;
        if (stored != computed && stored != pv_crc_legacy(computed)) {
            return pv__fail(err, PV_ECRC, computed, stored, out->id, 0);
        }
    }
    return 0;
}

int pv_needle_parse_tail(const uint8_t *tail, size_t len, uint8_t version, pv_needle *n, pv_errinfo *err) {
    if (version != 2 && version != 3) {
        return pv__fail(err, PV_EVERSION, version, 0, 0, 0);
    }
    size_t fields = 0;
    if (n->size != 0 || n->data_size != 0) {
        if (n->size < DATA_SIZE_BYTES || n->data_size > (uint32_t)n->size - DATA_SIZE_BYTES) {
            return pv__fail(err, PV_ECORRUPT, FIELD_DATA, 0, n->id, 0);
        }
        fields = (size_t)n->size - DATA_SIZE_BYTES - n->data_size;
    }
    if (len < fields || len - fields < tail_bytes(version)) {
        return pv__fail(err, PV_EEOF, 0, fields + tail_bytes(version), len, 0);
    }
    n->version = version;
    n->flags = 0;
    n->name_size = 0;
    n->mime_size = 0;
    n->pairs_size = 0;
    n->ttl_count = 0;
    n->ttl_unit = 0;
    n->last_modified_s = 0;
    n->append_at_ns = 0;
    n->name = NULL;
    n->mime = NULL;
    n->pairs = NULL;
    int rc = parse_fields(tail, fields, n, err);
    if (rc < 0) {
        return rc;
    }
    n->checksum = pv__get_be32(tail + fields);
    if (has_time(version)) {
        n->append_at_ns = pv__get_be64(tail + fields + CHECKSUM_BYTES);
    }
    return 0;
}

int pv_needle_body_size(const pv_needle *n, uint8_t version, int32_t *size) {
    if (!version_ok(version)) {
        return PV_EVERSION;
    }
    uint64_t len = n->data_size;
    if (version >= 2 && n->data_size > 0) {
        len += DATA_SIZE_BYTES + 1;
        len += (n->flags & PV_F_NAME) ? 1U + n->name_size : 0U;
        len += (n->flags & PV_F_MIME) ? 1U + n->mime_size : 0U;
        len += (n->flags & PV_F_MTIME) ? LAST_MODIFIED_BYTES : 0U;
        len += (n->flags & PV_F_TTL) ? TTL_BYTES : 0U;
        len += (n->flags & PV_F_PAIRS) ? (uint64_t)PAIRS_SIZE_BYTES + n->pairs_size : 0U;
    }
    if (len > BODY_MAX) {
        return PV_ERANGE;
    }
    *size = (int32_t)len;
    return 0;
}

static uint8_t *put_bytes(uint8_t *p, const uint8_t *from, size_t len) {
    if (len > 0) {
        memcpy(p, from, len);
    }
    return p + len;
}

/* Upstream's padding is what its reused header buffer holds behind the checksum (and time). out takes 8 bytes. */
static void padding_content(const pv_needle *n, uint8_t version, int32_t size, uint8_t *out) {
    if (version == 3) {
        pv__put_be32(out, (uint32_t)size);
        pv__put_be32(out + 4, 0);
        return;
    }
    pv__put_be64(out, n->id);
    if (version == 2 && n->data_size > 0 && (n->flags & PV_F_MTIME)) {
        pv__put_be32(out, (uint32_t)n->last_modified_s);
    }
}

int pv_needle_frame(const pv_needle *n, uint8_t version, uint8_t *head, size_t *head_len, uint8_t *tail,
                    size_t tail_cap, size_t *tail_len, int32_t *size, pv_errinfo *err) {
    int32_t body;
    int rc = pv_needle_body_size(n, version, &body);
    if (rc < 0) {
        return pv__fail(err, rc, rc == PV_EVERSION ? version : n->data_size, 0, n->id, 0);
    }
    size_t padding = (size_t)padding_bytes(body, version);
    int structured = version >= 2 && n->data_size > 0;
    size_t needed = (size_t)body - n->data_size - (structured ? DATA_SIZE_BYTES : 0U) + tail_bytes(version) + padding;
    if (tail_cap < needed) {
        return pv__fail(err, PV_EBUFFER, needed, 0, n->id, 0);
    }
    pv__put_be32(head, n->cookie);
    pv__put_be64(head + 4, n->id);
    pv__put_be32(head + 12, (uint32_t)body);
    *head_len = PV_NEEDLE_HEADER;
    uint8_t *p = tail;
    if (structured) {
        pv__put_be32(head + PV_NEEDLE_HEADER, n->data_size);
        *head_len += DATA_SIZE_BYTES;
        *p++ = n->flags;
        if (n->flags & PV_F_NAME) {
            *p++ = n->name_size;
            p = put_bytes(p, n->name, n->name_size);
        }
        if (n->flags & PV_F_MIME) {
            *p++ = n->mime_size;
            p = put_bytes(p, n->mime, n->mime_size);
        }
        if (n->flags & PV_F_MTIME) {
            pv__put_be40(p, n->last_modified_s);
            p += LAST_MODIFIED_BYTES;
        }
        if (n->flags & PV_F_TTL) {
            *p++ = n->ttl_count;
            *p++ = n->ttl_unit;
        }
        if (n->flags & PV_F_PAIRS) {
            pv__put_be16(p, n->pairs_size);
            p = put_bytes(p + PAIRS_SIZE_BYTES, n->pairs, n->pairs_size);
        }
    }
    pv__put_be32(p, n->checksum);
    p += CHECKSUM_BYTES;
    if (has_time(version)) {
        pv__put_be64(p, n->append_at_ns);
        p += TIME_BYTES;
    }
    uint8_t pad[PADDING_MAX];
    padding_content(n, version, body, pad);
    p = put_bytes(p, pad, padding);
    *tail_len = (size_t)(p - tail);
    *size = body;
    return 0;
}

void pv_superblock_parse(const uint8_t *buf8, pv_superblock *out) {
    out->version = buf8[0];
    out->replica_placement = buf8[1];
    out->ttl_count = buf8[2];
    out->ttl_unit = buf8[3];
    out->compaction_revision = pv__get_be16(buf8 + 4);
    out->extra_size = pv__get_be16(buf8 + 6);
}

void pv_superblock_put(const pv_superblock *sb, uint8_t *buf8) {
    buf8[0] = sb->version;
    buf8[1] = sb->replica_placement;
    buf8[2] = sb->ttl_count;
    buf8[3] = sb->ttl_unit;
    pv__put_be16(buf8 + 4, sb->compaction_revision);
    pv__put_be16(buf8 + 6, sb->extra_size);
}
