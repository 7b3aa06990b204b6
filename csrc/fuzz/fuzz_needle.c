/* fuzz_needle.c - the needle parsers on any bytes. Input: one byte (bits 0..1 version - 1, bit 2 no CRC), then a record.
 *
 * Whatever parses must come out the same when it is framed and parsed again, and its tail alone must parse to the same.
 */
#include "../pv_int.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static void must(int holds) {
    if (!holds) {
        abort();
    }
}

static void same_bytes(const uint8_t *a, size_t a_len, const uint8_t *b, size_t b_len) {
    must(a_len == b_len);
    must(a_len == 0 || memcmp(a, b, a_len) == 0);
}

static void same(const pv_needle *a, const pv_needle *b) {
    must(a->id == b->id && a->cookie == b->cookie && a->append_at_ns == b->append_at_ns);
    must(a->flags == b->flags && a->last_modified_s == b->last_modified_s);
    must(a->ttl_count == b->ttl_count && a->ttl_unit == b->ttl_unit);
    same_bytes(a->name, a->name_size, b->name, b->name_size);
    same_bytes(a->mime, a->mime_size, b->mime, b->mime_size);
    same_bytes(a->pairs, a->pairs_size, b->pairs, b->pairs_size);
}

static void frame_again(const pv_needle *n, uint8_t version) {
    static uint8_t tail[PV_NEEDLE_TAIL_MAX];
    uint8_t head[20];
    size_t head_len;
    size_t tail_len;
    int32_t size;
    must(pv_needle_frame(n, version, head, &head_len, tail, sizeof tail, &tail_len, &size, NULL) == 0);
    size_t total = head_len + n->data_size + tail_len;
    must((uint64_t)pv_needle_record_len(size, version) == total && total % 8 == 0);
    uint8_t *rec = malloc(total);
    must(rec != NULL);
    memcpy(rec, head, head_len);
    memcpy(rec + head_len, n->data, n->data_size);
    memcpy(rec + head_len + n->data_size, tail, tail_len);
    pv_needle again;
    must(pv_needle_parse(rec, total, version, size, 0, PV_PARSE_NO_CRC, &again, NULL) == 0);
    must(again.checksum == n->checksum);
    same_bytes(n->data, n->data_size, again.data, again.data_size);
    if (n->data_size > 0) {
        same(n, &again);
    }
    free(rec);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len < 1) {
        return 0;
    }
    const uint8_t version = (uint8_t)(1 + (data[0] & 3));
    const uint32_t flags = PV_PARSE_ANY_SIZE | ((data[0] & 4) ? PV_PARSE_NO_CRC : 0U);
    const uint8_t *rec = data + 1;
    len--;
    if (len >= PV_SUPERBLOCK) {
        uint8_t out[PV_SUPERBLOCK];
        pv_superblock sb;
        pv_superblock_parse(rec, &sb);
        pv_superblock_put(&sb, out);
        must(memcmp(rec, out, sizeof out) == 0);
    }
    pv_needle n;
    pv_errinfo err = {0};
    int rc = pv_needle_parse(rec, len, version, 0, 0, flags, &n, &err);
    must(rc == 0 || err.code == rc);
    if (rc < 0) {
        must(rc == PV_EEOF || rc == PV_ECORRUPT || rc == PV_ECRC || (rc == PV_EVERSION && version == 4));
    }
    if (rc != 0) {
        return 0;
    }
    must(n.size >= 0 && n.data >= rec && n.data + n.data_size <= rec + len);
    if (version > 1 && n.data_size > 0) {
        pv_needle tail = {.id = n.id, .cookie = n.cookie, .size = n.size, .data_size = n.data_size};
        const uint8_t *at = n.data + n.data_size;
        must(pv_needle_parse_tail(at, (size_t)(rec + len - at), version, &tail, &err) == 0);
        same(&n, &tail);
    }
    frame_again(&n, version);
    return 0;
}
