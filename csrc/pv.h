/* pv.h - the public C API of the pyvolume engine, and the only header cffi sees.
 *
 * Conventions
 *   Every function returns an int unless it is a pure computation that cannot fail: 0 or a count on success, a negative
 *   PV_E... code on failure. Codes of ours are <= -1000, so one int can also carry a negated errno nowhere else; the
 *   errno of a failed system call travels in pv_errinfo.sys_errno with code PV_ESYS.
 *   Ownership words: *borrows* (pointer used for the length of the call), *takes* (callee frees), *gives* (caller frees
 *   with the function named). Lengths are size_t, stored sizes have fixed width, offsets are bytes unless the name ends
 *   in _units8 (the stored offset, in units of 8 bytes).
 *   Nothing here knows of Python, logs, or keeps global state besides const tables.
 *   All on-disk integers of .dat and .idx are big-endian.
 *
 * Threads
 *   A pv_vol may be used from any number of threads. Lock order inside the engine: registry -> append mutex -> map lock.
 *   No lock survives the return of a function. Positional I/O only.
 *
 * build_ffi.py feeds this file to cffi after dropping preprocessor lines and the words PV_API and PV_WUR.
 */
#ifndef PV_H
#define PV_H

#include <stddef.h>
#include <stdint.h>

#define PV_API __attribute__((visibility("default")))
#define PV_WUR __attribute__((warn_unused_result))

/* ------------------------------------------------------------------ errors (pv_err.c) */

enum pv_err {
    PV_OK = 0,
    PV_ESYS = -1000,      /* a system call failed: sys_errno; a = offset, b = wanted bytes, c = done bytes */
    PV_ENOMEM = -1001,
    PV_EINVAL = -1002,    /* argument out of its documented range: a programming error or a hostile size */
    PV_EEOF = -1003,      /* file ends before what was asked for: a = offset, b = wanted bytes, c = got bytes */
    PV_ENOTFOUND = -1004, /* key not in the map, or offset 0 */
    PV_EDELETED = -1005,  /* key is deleted: a = old size (0 if unknown) */
    PV_ECOOKIE = -1006,   /* a = cookie given, b = cookie on disk */
    PV_ECRC = -1007,      /* a = computed, b = stored, c = needle id */
    PV_ESIZE = -1008,     /* header size differs: a = offset, b = found id, c = found size (as u32), d = expected size */
    PV_ECORRUPT = -1009,  /* a field runs past the body: a = field number 1..7 of the contract's table */
    PV_EVERSION = -1010,  /* unknown needle or super block version: a = version */
    PV_ECLOSED = -1011,   /* the volume handle was closed */
    PV_EREADONLY = -1012, /* the handle was opened or switched read-only */
    PV_EFULL = -1013,     /* append offset at the volume's size limit: a = offset, b = limit */
    PV_EBUFFER = -1014,   /* output buffer too small: a = needed bytes */
    PV_ERANGE = -1015,    /* number does not fit */
    PV_EEXISTS = -1016,   /* vid already in the registry */
    PV_EPARSE = -1017,    /* text or message malformed: a = sub-code documented at the function, b/c = position, length */
    PV_EMETA = -1018,     /* metadata span of a large needle out of bounds: a = span, b = data size, c = size, d = offset */
    PV_EID = -1019,       /* record's id is not the row's key: a = found id, b = expected key, c = offset */
    PV_EALIGN = -1020,    /* file length is not a multiple of the row size: a = length */
    PV_ESTALE = -1021,    /* the volume was compacted between two pieces of one read: look the needle up again */
    PV_EMORE = -1022      /* input incomplete, give more bytes (not a failure) */
};

typedef struct pv_errinfo {
    int32_t code;      /* the PV_E... code, 0 if none */
    int32_t sys_errno; /* errno with PV_ESYS, else 0 */
    uint64_t a;
    uint64_t b;
    uint64_t c;
    uint64_t d;
} pv_errinfo;

/* Name of a code, e.g. "PV_ECRC"; never NULL. Static storage. */
PV_API const char *pv_err_name(int code);

/* ------------------------------------------------------------------ checksum (pv_crc.c) */

/* CRC-32C over buf continued from prev (0 to begin): pv_crc32c(0, "123456789", 9) == 0xe3069283. Any length. */
PV_API uint32_t pv_crc32c(uint32_t prev, const void *buf, size_t len);
/* The stored form used before 3.09: ((c >> 15) | (c << 17)) + 0xa282ead8. */
PV_API uint32_t pv_crc_legacy(uint32_t crc);

/* ------------------------------------------------------------------ needle records (pv_needle.c) */

#define PV_NEEDLE_HEADER 16
#define PV_NEEDLE_TAIL_MAX 66112 /* flags..pairs, checksum, time, padding: upper bound */

enum pv_needle_flag {
    PV_F_COMPRESSED = 0x01,
    PV_F_NAME = 0x02,
    PV_F_MIME = 0x04,
    PV_F_MTIME = 0x08,
    PV_F_TTL = 0x10,
    PV_F_PAIRS = 0x20,
    PV_F_MANIFEST = 0x80
};

/* One needle in parsed form. Pointers are borrowed from the buffer it was parsed from, or from whoever filled it in. */
typedef struct pv_needle {
    uint64_t id;
    uint64_t append_at_ns; /* v3, else 0 */
    uint64_t last_modified_s; /* low 40 bits are stored */
    uint32_t cookie;
    int32_t size;          /* header Size: body bytes without checksum, time and padding */
    uint32_t data_size;
    uint32_t checksum;     /* raw CRC-32C; after a parse that skipped the CRC: the stored word */
    uint8_t flags;
    uint8_t ttl_count;
    uint8_t ttl_unit;
    uint8_t name_size;
    uint8_t mime_size;
    uint8_t version;
    uint16_t pairs_size;
    const uint8_t *data;
    const uint8_t *name;
    const uint8_t *mime;
    const uint8_t *pairs;
} pv_needle;

enum pv_parse_flag { PV_PARSE_NO_CRC = 1, PV_PARSE_ANY_SIZE = 2 /* do not compare the header with expected_size */ };

/* Length on disk of a record with this header size, padding (1..8) included. Go's formula on the signed value, so a
 * negative size gives what upstream gets (-5 -> 24 for version 3); the result may be <= 0 for hostile sizes. */
PV_API int64_t pv_needle_record_len(int32_t size, uint8_t version);
/* Reads cookie, id, size from 16 bytes. */
PV_API void pv_needle_header(const uint8_t *buf16, uint32_t *cookie, uint64_t *id, int32_t *size);
/* Parses one whole record (header..time; padding may be missing). Borrows buf; out points into it.
 * Errors: PV_ESIZE, PV_ECORRUPT, PV_ECRC, PV_EVERSION, PV_EEOF (buf too short). On PV_ECRC out is filled all the same. */
PV_API int pv_needle_parse(const uint8_t *buf, size_t len, uint8_t version, int32_t expected_size, uint64_t offset,
                           uint32_t flags, pv_needle *out, pv_errinfo *err) PV_WUR;
/* Parses flags..time from the tail that follows DataSize+Data of a v2/v3 record (metadata-only reads).
 * tail: size - 4 - data_size bytes of fields, then checksum, time. n->size, data_size, id, cookie must be set. */
PV_API int pv_needle_parse_tail(const uint8_t *tail, size_t len, uint8_t version, pv_needle *n, pv_errinfo *err) PV_WUR;
/* Header Size this needle will have in this version (sets nothing). */
PV_API int pv_needle_body_size(const pv_needle *n, uint8_t version, int32_t *size) PV_WUR;
/* Serialises without copying the data: head (16 or 20 bytes) | n->data | tail (fields, checksum, time, padding with
 * Go's padding bytes, contract storage.md 3.1). head needs 20 bytes, tail PV_NEEDLE_TAIL_MAX. n->size is computed and
 * returned in *size; n->checksum is written as given. */
PV_API int pv_needle_frame(const pv_needle *n, uint8_t version, uint8_t *head, size_t *head_len, uint8_t *tail,
                           size_t tail_cap, size_t *tail_len, int32_t *size, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ super block (pv_needle.c) */

#define PV_SUPERBLOCK 8
typedef struct pv_superblock {
    uint8_t version;
    uint8_t replica_placement;
    uint8_t ttl_count;
    uint8_t ttl_unit;
    uint16_t compaction_revision;
    uint16_t extra_size;
} pv_superblock;
PV_API void pv_superblock_parse(const uint8_t *buf8, pv_superblock *out);
PV_API void pv_superblock_put(const pv_superblock *sb, uint8_t *buf8);

/* ------------------------------------------------------------------ index rows (pv_idx.c) */

typedef struct pv_idx_row {
    uint64_t key;
    uint64_t offset; /* bytes (stored units * 8) */
    int32_t size;
    int32_t reserved;
} pv_idx_row;

/* width is 4 or 5; a row has 12 + width bytes. */
PV_API void pv_idx_row_parse(const uint8_t *buf, uint8_t width, pv_idx_row *out);
PV_API void pv_idx_row_put(const pv_idx_row *row, uint8_t width, uint8_t *buf);
/* Reads up to max_rows rows beginning with row number first_row; returns the number read (0 at the end; a ragged tail
 * is not a row). */
PV_API int pv_idx_read(int fd, uint8_t width, uint64_t first_row, pv_idx_row *rows, size_t max_rows, pv_errinfo *err) PV_WUR;

typedef struct pv_idx_summary {
    uint64_t file_bytes;
    uint64_t rows;           /* whole rows */
    uint64_t ragged_bytes;   /* bytes behind the last whole row */
    uint64_t max_key;
    uint64_t max_end;        /* largest offset + record length over rows with offset != 0 (tombstones count as size 0) */
    pv_idx_row last;         /* last whole row */
    pv_idx_row furthest;     /* the row max_end comes from */
    uint64_t leading_zero_rows; /* rows at the head with offset 0 and size -1 */
    uint64_t past_end;       /* live rows that end behind dat_size */
    uint64_t first_past_end_key;
    uint64_t max_valid_end;  /* largest offset + record length over rows with size >= 0 */
} pv_idx_summary;
PV_API int pv_idx_summarize(int fd, uint8_t width, uint8_t version, uint64_t dat_size, pv_idx_summary *out, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ needle map (pv_map.c) */

/* Sizes in a map: > 0 live, 0 live and empty, < 0 deleted (absolute value = old size, -1 also for a deleted empty file). */
typedef struct pv_map pv_map;

typedef struct pv_map_stats {
    uint64_t entries;       /* keys held, deleted ones included */
    uint64_t file_count;    /* puts, overwrites included (contract storage.md 15) */
    uint64_t file_bytes;    /* sum of put sizes */
    uint64_t deleted_count;
    uint64_t deleted_bytes;
    uint64_t max_key;
    uint64_t memory_bytes;  /* allocated by the map */
} pv_map_stats;

/* Gives a map; free with pv_map_free. */
PV_API int pv_map_new(uint8_t width, pv_map **out) PV_WUR;
PV_API void pv_map_free(pv_map *m);
/* Found: 0 and *offset (bytes), *size (maybe negative). Else PV_ENOTFOUND. Takes the map lock shared. */
PV_API int pv_map_get(pv_map *m, uint64_t key, uint64_t *offset, int32_t *size) PV_WUR;
/* Sets a key and counts. *old_offset, *old_size: what was there (old_size 0 and old_offset 0 if nothing). */
PV_API int pv_map_put(pv_map *m, uint64_t key, uint64_t offset, int32_t size, uint64_t *old_offset, int32_t *old_size) PV_WUR;
/* Negates the size of a key (0 becomes -1) and counts. *old_size: size before; PV_ENOTFOUND if the key is unknown. */
PV_API int pv_map_delete(pv_map *m, uint64_t key, int32_t *old_size) PV_WUR;
/* Replays rows [first_row, end) of an index file: storage.md 5 and 15 ("memory, after reload"). first_row 0 for a load. */
PV_API int pv_map_load(pv_map *m, int fd, uint64_t first_row, uint64_t *rows_done, pv_errinfo *err) PV_WUR;
/* Copies up to max entries with key >= from in ascending order; returns the count. */
PV_API int pv_map_visit(pv_map *m, uint64_t from, pv_idx_row *rows, size_t max) PV_WUR;
PV_API void pv_map_stat(pv_map *m, pv_map_stats *out);

/* ------------------------------------------------------------------ volume handle (pv_vol.c) */

typedef struct pv_vol pv_vol;

enum pv_vol_flag {
    PV_VOL_CREATE = 1,       /* create .dat (truncating) and .idx, write the super block given */
    PV_VOL_DAT_READONLY = 2, /* open .dat O_RDONLY */
    PV_VOL_IDX_READONLY = 4, /* open .idx O_RDONLY */
    PV_VOL_NO_MAP = 8,       /* the map lives outside (Python): write, delete and read take the entry from the caller */
    PV_VOL_NO_WRITE = 16,    /* start with writes refused */
    PV_VOL_NO_DELETE = 32    /* start with deletes refused too */
};

typedef struct pv_vol_opts {
    const char *dat_path; /* borrows */
    const char *idx_path; /* borrows */
    uint32_t vid;
    uint32_t flags;
    uint8_t offset_width;     /* 4 or 5 */
    uint8_t version;          /* 0: the super block's; else overrides how records are read and written */
    uint8_t has_ttl;          /* the volume has a ttl: the unchanged test of a write is skipped */
    uint8_t reserved;
    uint64_t preallocate_bytes; /* with PV_VOL_CREATE: fallocate(KEEP_SIZE) */
    uint64_t max_volume_bytes;  /* 0: 32 GiB for width 4, 8 TiB for width 5 */
    uint64_t last_append_at_ns; /* what pv_vol_check_tail found; 0: taken from the last index row's record, if readable */
    pv_superblock superblock;   /* with PV_VOL_CREATE */
} pv_vol_opts;

typedef struct pv_vol_stats {
    uint64_t dat_bytes;       /* append offset: file length rounded up to 8 at open, then end of last record */
    uint64_t idx_bytes;
    uint64_t file_count;
    uint64_t file_bytes;
    uint64_t deleted_count;
    uint64_t deleted_bytes;
    uint64_t max_key;
    uint64_t map_entries;
    uint64_t map_bytes;
    uint64_t last_append_at_ns;
    uint64_t last_modified_s;  /* largest LastModified written since open, 0 if none */
    uint64_t last_write_wall_s; /* wall clock of the last extending write since open, 0 if none */
    uint64_t eio_count;        /* consecutive EIO seen */
    uint32_t vid;
    uint16_t compaction_revision;
    uint8_t version;
    uint8_t offset_width;
    uint8_t no_write;
    uint8_t no_delete;
    uint8_t closed;
    uint8_t reserved;
} pv_vol_stats;

/* Opens (or creates) a volume: opens both files, reads the super block, loads the map. Checks nothing else (callers use
 * pv_idx_summarize and pv_vol_check_tail first). A missing .idx is created unless PV_VOL_IDX_READONLY. With
 * PV_VOL_CREATE the names are made durable; on failure what was created stays for the caller to remove.
 * Gives a handle with one reference; drop it with pv_vol_unref.
 * Errors: PV_ESYS (err->d: 0 = .dat, 1 = .idx), PV_EEOF (short super block), PV_EVERSION, PV_EALIGN (ragged .idx),
 * PV_ENOMEM, PV_EINVAL. */
PV_API int pv_vol_open(const pv_vol_opts *opts, pv_vol **out, pv_errinfo *err) PV_WUR;
PV_API pv_vol *pv_vol_ref(pv_vol *v);
PV_API void pv_vol_unref(pv_vol *v); /* the last one closes and frees */
/* Marks the handle closed, waits for running operations to end, syncs .idx then .dat unless they are read-only, closes
 * the files. Later calls answer PV_ECLOSED. Idempotent: a second call waits for the first and returns 0. The handle is
 * closed also when a sync failed (PV_ESYS, err->d: 0 = .dat, 1 = .idx). */
PV_API int pv_vol_close(pv_vol *v, pv_errinfo *err) PV_WUR;
/* Never waits for an append or a flush. Answers for a closed handle too, with the last figures and closed = 1. The
 * figures that come from the map are 0 with PV_VOL_NO_MAP. */
PV_API int pv_vol_stat(pv_vol *v, pv_vol_stats *out) PV_WUR;
PV_API void pv_vol_superblock(pv_vol *v, pv_superblock *out);
/* Switches writes and deletes off or on; waits for appends and flushes that are under way. Switching on answers
 * PV_EREADONLY for files opened read-only, and PV_ESYS while bytes of a failed append cannot be cut off. */
PV_API int pv_vol_set_readonly(pv_vol *v, uint8_t no_write, uint8_t no_delete) PV_WUR;
/* fdatasync of .dat, then .idx (err->d: 0 = .dat, 1 = .idx). Takes waiting fsync writes along. */
PV_API int pv_vol_sync(pv_vol *v, pv_errinfo *err) PV_WUR;

typedef struct pv_entry {
    uint64_t offset;  /* bytes; 0 = none */
    int32_t size;     /* as in a map */
    uint32_t revision; /* compaction revision the offset belongs to */
} pv_entry;
/* Looks a key up. PV_ENOTFOUND, PV_ECLOSED; with PV_VOL_NO_MAP PV_EINVAL. */
PV_API int pv_vol_lookup(pv_vol *v, uint64_t id, pv_entry *out) PV_WUR;
/* Copies up to max map entries with key >= from in ascending order (deleted ones included, with negative sizes); returns
 * the count. PV_ECLOSED; with PV_VOL_NO_MAP PV_EINVAL. */
PV_API int pv_vol_visit(pv_vol *v, uint64_t from, pv_idx_row *rows, size_t max) PV_WUR;

enum pv_read_flag {
    PV_READ_DELETED = 1,    /* readDeleted: serve a deleted needle whose old size is known */
    PV_READ_META_OK = 2,    /* a needle with size > PV_META_ONLY_ABOVE may be read without its data (data == NULL) */
    PV_READ_ENTRY = 4       /* use *entry instead of the map */
};
#define PV_META_ONLY_ABOVE 1048576

typedef struct pv_read {
    pv_needle n;            /* n.data == NULL with meta_only */
    pv_entry entry;         /* where it was found */
    uint64_t data_offset;   /* byte offset of Data in .dat */
    uint8_t meta_only;
    uint8_t empty;          /* size 0: nothing was read, cookie not checked */
    uint16_t reserved;
    uint32_t reserved2;
    uint8_t *buf;           /* gives: free with pv_read_free */
    size_t buf_len;
} pv_read;

/* Reads one needle (contract storage.md 13): lookup, positional read, parse, CRC, one retry at +32 GiB for width 4.
 * The cookie and the ttl are the caller's business. Errors: PV_ENOTFOUND, PV_EDELETED, PV_ESIZE, PV_ECORRUPT, PV_ECRC,
 * PV_EEOF, PV_ESYS, PV_ECLOSED, PV_EMETA, PV_ENOMEM, PV_ESTALE (PV_READ_ENTRY with another revision). On error nothing
 * is given. A version 1 needle has no metadata to read apart: it is always read whole. */
PV_API int pv_vol_read(pv_vol *v, uint64_t id, uint32_t flags, const pv_entry *entry, pv_read *out, pv_errinfo *err) PV_WUR;
PV_API void pv_read_free(pv_read *r);
/* Reads len bytes of .dat at a byte offset into buf, if the volume still has that compaction revision (else PV_ESTALE).
 * Short at end of file: PV_EEOF. For streaming large needles. */
PV_API int pv_vol_pread(pv_vol *v, uint64_t offset, uint8_t *buf, size_t len, uint32_t revision, pv_errinfo *err) PV_WUR;

enum pv_write_flag {
    PV_WRITE_CHECK_COOKIE = 1, /* refuse another cookie; without it cookie 0 adopts the stored one */
    PV_WRITE_FSYNC = 2,        /* data on disk before the entry is published and the call returns (group commit) */
    PV_WRITE_ENTRY = 4         /* PV_VOL_NO_MAP: *known is the caller's map entry (offset 0 = none). Without it the key
                                  counts as absent. Calls for one key must be serialised by the owner of the map. */
};

typedef struct pv_write_res {
    uint64_t offset;          /* of the record */
    uint64_t append_at_ns;
    int32_t size;             /* header Size written */
    uint32_t checksum;
    uint32_t cookie;          /* as written (adopted or given) */
    uint8_t unchanged;        /* nothing was written: same cookie, checksum and data are there already */
    uint8_t reserved[3];
} pv_write_res;

/* Appends one needle (contract storage.md 14): unchanged test, cookie test against the stored header, append time
 * max(now, last + 1), record, index row, map entry, in this order, under the append mutex. Borrows n and its buffers;
 * n->checksum is computed here. n->append_at_ns and n->size are ignored. A failed append is truncated back; the volume
 * stays writable. Errors: PV_EREADONLY, PV_ECLOSED, PV_ECOOKIE, PV_ENOMEM, PV_EINVAL, PV_ESTALE (*known has another
 * revision), and
 *   PV_EFULL   a = append offset, b = limit; with PV_WRITE_FSYNC also d = 1: a = sum of all sizes written, b = limit
 *              (upstream has another text for it)
 *   PV_EEOF    d = 1: the existing needle's header could not be read whole
 *   PV_ESYS    d = bits: 1 reading the existing needle, 2 the index row (else the record), 4 the flush, 8 the roll back
 *              failed too and the handle has switched itself read-only (pv_vol_set_readonly tries again)
 * On failure out->size and out->offset tell the record that was tried, as far as that was known. */
PV_API int pv_vol_write(pv_vol *v, const pv_needle *n, uint32_t flags, const pv_entry *known, pv_write_res *out,
                        pv_errinfo *err) PV_WUR;
/* Appends a tombstone for a live key (size >= 0): record with Size 0, cookie and checksum as given, then the row
 * (key, tombstone offset, -1), then the map. *deleted_size: the old header Size. A key that is absent or deleted is no
 * error: returns 0 with *deleted_size = -1 and nothing written. */
PV_API int pv_vol_delete(pv_vol *v, uint64_t id, uint32_t cookie, uint32_t checksum, uint32_t flags, const pv_entry *known,
                         int32_t *deleted_size, pv_write_res *out, pv_errinfo *err) PV_WUR;
/* Appends a ready record (WriteNeedleBlob, tail): the blob as it is, but with a new append time in version 3; the map key
 * is id, not the blob's. What is behind the record's length is cut off, missing padding is made up with zeros, so that
 * the next record stays aligned. Unchanged test as in storage.md 14; flags: PV_WRITE_FSYNC, PV_WRITE_ENTRY with *known.
 * Errors as pv_vol_write without the cookie, and
 *   PV_ESIZE   a = 0: blob shorter than a header, b = len; a = 1: c = Size in the blob's header, d = size; a = 2: d = size
 *              is negative
 *   PV_EFULL   always with d = 1, as with PV_WRITE_FSYNC
 *   PV_EBUFFER the blob ends before its record's checksum and time: a = needed, b = given bytes */
PV_API int pv_vol_write_blob(pv_vol *v, uint64_t id, int32_t size, const uint8_t *blob, size_t len, uint32_t flags,
                             const pv_entry *known, pv_write_res *out, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ scanning .dat (pv_scan.c) */

typedef struct pv_scan_rec {
    uint64_t offset;
    uint64_t id;
    uint64_t append_at_ns;
    uint64_t last_modified_s;
    int64_t record_len;
    uint32_t cookie;
    int32_t size;
    uint32_t data_size;
    uint32_t checksum;
    int32_t status;    /* 0, or PV_ECRC, PV_ECORRUPT, ... of this record's body */
    uint8_t flags;
    uint8_t ttl_count;
    uint8_t ttl_unit;
    uint8_t reserved;
} pv_scan_rec;

/* Reads records of a data file from *offset on, up to max records or end_offset (or the end of the file, if that comes
 * first); advances *offset to where the next call goes on. Returns the count, 0 at a clean end: less than a header is
 * left (*offset tells where). A record that lacks nothing but padding counts as whole, *offset is then behind the end.
 * Header fields are always set; what stands in the body (append time, flags, ttl, data size, checksum) only with
 * check_body, which reads and checks it: status is that record's result. A zero-filled region gives records of id 0,
 * cookie 0, size 0. Memory is bounded whatever the sizes in the file say. fd is borrowed. Errors, given only when no
 * record comes before them:
 *   PV_EEOF     the record at *offset is cut off: a = *offset, b = its length, c = bytes left
 *   PV_ECORRUPT a = 0: the header at *offset has a negative Size from which no next record can be found: b = *offset,
 *               c = Size
 *   PV_ESYS, PV_ENOMEM, PV_EVERSION, PV_EINVAL (max 0 or above INT32_MAX) */
PV_API int pv_dat_scan(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, int check_body, pv_scan_rec *recs,
                       size_t max, pv_errinfo *err) PV_WUR;

enum pv_tail_verdict {
    PV_TAIL_OK = 0,
    PV_TAIL_IDX_RAGGED = 1,  /* storage.md 11: "index file's size is %d bytes, maybe corrupted": a = size */
    PV_TAIL_DAT_LONGER = 2,  /* a = actual, b = expected bytes */
    PV_TAIL_DAT_SHORTER = 3, /* a = wanted end, b = actual */
    PV_TAIL_BAD_RECORD = 4   /* err tells: PV_ESIZE, PV_EID, PV_ECRC, PV_ECORRUPT */
};
/* The one-record integrity check of storage.md 11 on files not yet opened as a volume. Returns a verdict >= 0.
 * *last_append_at_ns is set when the record was readable (v3). */
PV_API int pv_vol_check_tail(int dat_fd, int idx_fd, uint8_t width, uint8_t version, uint64_t *last_append_at_ns,
                             pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ registry (pv_reg.c) */

/* vid -> volume handle, for lanes that must not ask Python. The registry holds a reference of its own. */
typedef struct pv_reg pv_reg;
PV_API int pv_reg_new(pv_reg **out) PV_WUR;
PV_API void pv_reg_free(pv_reg *r); /* drops its references */
PV_API int pv_reg_publish(pv_reg *r, uint32_t vid, pv_vol *v) PV_WUR; /* PV_EEXISTS */
PV_API int pv_reg_withdraw(pv_reg *r, uint32_t vid) PV_WUR;           /* PV_ENOTFOUND */
/* Gives a reference (pv_vol_unref), or NULL. */
PV_API pv_vol *pv_reg_acquire(pv_reg *r, uint32_t vid) PV_WUR;
PV_API int pv_reg_count(pv_reg *r);

/* ------------------------------------------------------------------ HTTP semantics (pv_http.c) */
/* BEGIN pv_http (declared by the HTTP part; pure functions, no I/O, no allocation unless said) */
/* END pv_http */

#endif
