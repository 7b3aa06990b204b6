/* pv_delete.c - the text side of many deletes: file ids in, results out (contract grpc.md 5, BatchDelete).
 *
 * Only what is plain is dealt with here; what is wrong with a line, and how that is said, is for its single parser.
 */
#include "pv_http_int.h"

#include <string.h>

#define ANSWER_MAX 32U /* beside the line: two tags and lengths, status, size */

static void parse_line(const char *p, size_t n, uint32_t flags, pv_delete *out) {
    const char *comma = memchr(p, ',', n);
    if (comma == NULL || comma == p) {
        return;
    }
    size_t vid_len = (size_t)(comma - p);
    size_t fid_len = n - vid_len - 1;
    uint64_t id;
    uint32_t vid;
    uint32_t cookie;
    if (pv_vid_parse(p, vid_len, &vid, NULL) < 0 || pv_fid_parse(comma + 1, fid_len, &id, &cookie, NULL) < 0 ||
        ((flags & PV_DELETE_ANY_COOKIE) && memchr(comma + 1, '_', fid_len) != NULL)) {
        return;
    }
    out->vid = vid;
    out->id = id;
    out->cookie = cookie;
    out->ok = 1;
}

int pv_delete_parse(const char *text, size_t len, uint32_t flags, pv_delete *out, size_t n) {
    if (len > UINT32_MAX || n > INT32_MAX) {
        return PV_EINVAL;
    }
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        if (at > len) {
            return PV_EINVAL;
        }
        const char *end = at < len ? memchr(text + at, '\n', len - at) : NULL;
        size_t line_len = end != NULL ? (size_t)(end - text) - at : len - at;
        memset(&out[i], 0, sizeof out[i]);
        out[i].at = (uint32_t)at;
        out[i].len = (uint32_t)line_len;
        if (line_len > 0) {
            parse_line(text + at, line_len, flags, &out[i]);
        }
        at += line_len + 1;
    }
    return at == len + 1 ? (int)n : PV_EINVAL;
}

static uint8_t *put_varint(uint8_t *p, uint64_t value) {
    for (; value > 0x7f; value >>= 7) {
        *p++ = (uint8_t)(value | 0x80);
    }
    *p++ = (uint8_t)value;
    return p;
}

int64_t pv_delete_answer(const char *text, const pv_delete *items, size_t n, uint8_t *buf, size_t cap) {
    uint8_t *p = buf;
    for (size_t i = 0; i < n; i++) {
        const pv_delete *item = &items[i];
        uint8_t head[8];
        uint8_t tail[16];
        if (cap - (size_t)(p - buf) < (size_t)item->len + ANSWER_MAX) {
            return PV_EBUFFER;
        }
        uint8_t *t = tail;
        *t++ = 2 << 3; /* status */
        t = put_varint(t, item->size > 0 ? 202 : 304);
        if (item->size > 0) {
            *t++ = 4 << 3; /* size */
            t = put_varint(t, (uint64_t)item->size);
        }
        head[0] = 1 << 3 | 2; /* file_id */
        size_t head_len = (size_t)(put_varint(head + 1, item->len) - head);
        size_t tail_len = (size_t)(t - tail);
        *p++ = 1 << 3 | 2; /* results */
        p = put_varint(p, head_len + item->len + tail_len);
        memcpy(p, head, head_len);
        memcpy(p + head_len, text + item->at, item->len);
        memcpy(p + head_len + item->len, tail, tail_len);
        p += head_len + item->len + tail_len;
    }
    return p - buf;
}
