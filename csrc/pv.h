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
 * build_ffi.py feeds this file to cffi after dropping preprocessor lines and the words PV_API, PV_WUR and PV_QUICK. The last
 * marks what is over within microseconds, waits for nothing and looks at little: Python calls it with the interpreter's lock held
 * (docs/decisions/0062-calls-that-keep-the-lock.md).
 */
#ifndef PV_H
#define PV_H

#include <stddef.h>
#include <stdint.h>

#define PV_API __attribute__((visibility("default")))
#define PV_WUR __attribute__((warn_unused_result))
#define PV_QUICK

/* ------------------------------------------------------------------ errors (pv_err.c) */

enum pv_err {
    PV_OK = 0,
    PV_ESYS = -1000, /* a system call failed: sys_errno; a = offset, b = wanted bytes, c = done bytes */
    PV_ENOMEM = -1001,
    PV_EINVAL = -1002,    /* argument out of its documented range: a programming error or a hostile size */
    PV_EEOF = -1003,      /* file ends before what was asked for: a = offset, b = wanted bytes, c = got bytes */
    PV_ENOTFOUND = -1004, /* key not in the map, or offset 0 */
    PV_EDELETED = -1005,  /* key is deleted: a = old size (0 if unknown) */
    PV_ECOOKIE = -1006,   /* a = cookie given, b = cookie on disk */
    PV_ECRC = -1007,      /* a = computed, b = stored, c = needle id */
    PV_ESIZE = -1008,    /* header size differs: a = offset, b = found id, c = found size (as u32), d = expected size */
    PV_ECORRUPT = -1009, /* a field runs past the body: a = field number 1..7 of the contract's table */
    PV_EVERSION = -1010, /* unknown needle or super block version: a = version */
    PV_ECLOSED = -1011,  /* the volume handle was closed */
    PV_EREADONLY = -1012, /* the handle was opened or switched read-only */
    PV_EFULL = -1013,     /* append offset at the volume's size limit: a = offset, b = limit */
    PV_EBUFFER = -1014,   /* output buffer too small: a = needed bytes */
    PV_ERANGE = -1015,    /* number does not fit */
    PV_EEXISTS = -1016,   /* vid already in the registry */
    PV_EPARSE = -1017, /* text or message malformed: a = sub-code documented at the function, b/c = position, length */
    PV_EMETA = -1018, /* metadata span of a large needle out of bounds: a = span, b = data size, c = size, d = offset */
    PV_EID = -1019,   /* record's id is not the row's key: a = found id, b = expected key, c = offset */
    PV_EALIGN = -1020, /* file length is not a multiple of the row size: a = length */
    PV_ESTALE = -1021, /* the volume was compacted between two pieces of one read: look the needle up again */
    PV_EMORE = -1022   /* input incomplete, give more bytes (not a failure) */
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
PV_API PV_QUICK const char *pv_err_name(int code);

/* ------------------------------------------------------------------ checksum (pv_crc.c) */

/* CRC-32C over buf continued from prev (0 to begin): pv_crc32c(0, "123456789", 9) == 0xe3069283. Any length. */
PV_API uint32_t pv_crc32c(uint32_t prev, const void *buf, size_t len);
/* The stored form used before 3.09: ((c >> 15) | (c << 17)) + 0xa282ead8. */
PV_API PV_QUICK uint32_t pv_crc_legacy(uint32_t crc);

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
    uint64_t append_at_ns;    /* v3, else 0 */
    uint64_t last_modified_s; /* low 40 bits are stored */
    uint32_t cookie;
    int32_t size; /* header Size: body bytes without checksum, time and padding */
    uint32_t data_size;
    uint32_t checksum; /* raw CRC-32C; after a parse that skipped the CRC: the stored word */
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
PV_API PV_QUICK int64_t pv_needle_record_len(int32_t size, uint8_t version);
/* Reads cookie, id, size from 16 bytes. */
PV_API PV_QUICK void pv_needle_header(const uint8_t *buf16, uint32_t *cookie, uint64_t *id, int32_t *size);
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
PV_API PV_QUICK void pv_superblock_parse(const uint8_t *buf8, pv_superblock *out);
PV_API PV_QUICK void pv_superblock_put(const pv_superblock *sb, uint8_t *buf8);

/* ------------------------------------------------------------------ index rows (pv_idx.c) */

typedef struct pv_idx_row {
    uint64_t key;
    uint64_t offset; /* bytes (stored units * 8) */
    int32_t size;
    int32_t reserved;
} pv_idx_row;

/* width is 4 or 5; a row has 12 + width bytes. */
PV_API PV_QUICK void pv_idx_row_parse(const uint8_t *buf, uint8_t width, pv_idx_row *out);
PV_API PV_QUICK void pv_idx_row_put(const pv_idx_row *row, uint8_t width, uint8_t *buf);
/* Reads up to max_rows rows beginning with row number first_row; returns the number read (0 at the end; a ragged tail
 * is not a row). */
PV_API int pv_idx_read(int fd, uint8_t width, uint64_t first_row, pv_idx_row *rows, size_t max_rows,
                       pv_errinfo *err) PV_WUR;

typedef struct pv_idx_summary {
    uint64_t file_bytes;
    uint64_t rows;         /* whole rows */
    uint64_t ragged_bytes; /* bytes behind the last whole row */
    uint64_t max_key;
    uint64_t max_end;    /* largest offset + record length over rows with offset != 0 (tombstones count as size 0) */
    pv_idx_row last;     /* last whole row */
    pv_idx_row furthest; /* the row max_end comes from */
    uint64_t leading_zero_rows; /* rows at the head with offset 0 and size -1 */
    uint64_t past_end;          /* live rows that end behind dat_size */
    uint64_t first_past_end_key;
    uint64_t max_valid_end; /* largest offset + record length over rows with size >= 0 */
    uint64_t blank_rows;    /* rows of zeros, version 3: but for the key, which nobody writes: lost in a power cut */
    uint64_t first_blank_row;
} pv_idx_summary;
PV_API int pv_idx_summarize(int fd, uint8_t width, uint8_t version, uint64_t dat_size, pv_idx_summary *out,
                            pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ needle map (pv_map.c) */

/* Sizes in a map: > 0 live, 0 live and empty, < 0 deleted (absolute value = old size, -1 also for a deleted empty file). */
typedef struct pv_map pv_map;

typedef struct pv_map_stats {
    uint64_t entries;    /* keys held, deleted ones included */
    uint64_t file_count; /* puts, overwrites included (contract storage.md 15) */
    uint64_t file_bytes; /* sum of put sizes */
    uint64_t deleted_count;
    uint64_t deleted_bytes;
    uint64_t max_key;
    uint64_t memory_bytes; /* allocated by the map */
} pv_map_stats;

/* Gives a map; free with pv_map_free. */
PV_API int pv_map_new(uint8_t width, pv_map **out) PV_WUR;
/* Gives the map of a volume that takes no writes: it lives in the sorted file sdx_path, which is made from the index if it
 * is not newer or does not fit. put and load answer PV_EINVAL; a delete sets the row's size to -1 and counts nothing, and
 * what a deleted needle's size was is not kept. Reads the whole index; get reads the file. idx_fd is borrowed. */
PV_API int pv_map_open_sorted(uint8_t width, const char *sdx_path, int idx_fd, pv_map **out, pv_errinfo *err) PV_WUR;
PV_API void pv_map_free(pv_map *m);
/* Found: 0 and *offset (bytes), *size (maybe negative). Else PV_ENOTFOUND. Takes the map lock shared. */
PV_API int pv_map_get(pv_map *m, uint64_t key, uint64_t *offset, int32_t *size) PV_WUR;
/* Sets a key and counts. *old_offset, *old_size: what was there (old_size 0 and old_offset 0 if nothing). */
PV_API int pv_map_put(pv_map *m, uint64_t key, uint64_t offset, int32_t size, uint64_t *old_offset,
                      int32_t *old_size) PV_WUR;
/* Negates the size of a key (0 becomes -1) and counts. *old_size: size before; PV_ENOTFOUND if the key is unknown. */
PV_API int pv_map_delete(pv_map *m, uint64_t key, int32_t *old_size) PV_WUR;
/* Replays rows [first_row, end) of an index file: storage.md 5 and 15 ("memory, after reload"). first_row 0 for a load. Into
 * an empty map a long index whose keys come shuffled is replayed in the order of keys (pv_shuffled.c); then after an error
 * the map is good for nothing, else it has *rows_done rows. */
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
    PV_VOL_NO_DELETE = 32,   /* start with deletes refused too */
    PV_VOL_SORTED_MAP = 64,  /* the map is a sorted file, opts.sdx_path: for volumes that take no writes */
    PV_VOL_REMOTE = 128, /* there is no .dat here: look-ups and deletes only, who reads fetches the bytes elsewhere */
    PV_VOL_FLUSH_FAILED = 256 /* a flush of this .dat failed before: what the page cache shows need not be on disk */
};

typedef struct pv_vol_opts {
    const char *dat_path; /* borrows */
    const char *idx_path; /* borrows */
    const char *sdx_path; /* borrows; with PV_VOL_SORTED_MAP */
    uint32_t vid;
    uint32_t flags;
    uint8_t offset_width; /* 4 or 5 */
    uint8_t version;      /* 0: the super block's; else overrides how records are read and written */
    uint8_t has_ttl;      /* the volume has a ttl: the unchanged test of a write is skipped */
    uint8_t reserved;
    uint64_t preallocate_bytes; /* with PV_VOL_CREATE: fallocate(KEEP_SIZE) */
    uint64_t max_volume_bytes;  /* 0: 32 GiB for width 4, 8 TiB for width 5 */
    uint64_t
        last_append_at_ns;    /* what pv_vol_check_tail found; 0: taken from the last index row's record, if readable */
    pv_superblock superblock; /* with PV_VOL_CREATE and PV_VOL_REMOTE */
    uint64_t remote_bytes;    /* with PV_VOL_REMOTE: length of the data */
} pv_vol_opts;

typedef struct pv_vol_stats {
    uint64_t dat_bytes; /* append offset: file length rounded up to 8 at open, then end of last record */
    uint64_t idx_bytes;
    uint64_t file_count;
    uint64_t file_bytes;
    uint64_t deleted_count;
    uint64_t deleted_bytes;
    uint64_t max_key;
    uint64_t map_entries;
    uint64_t map_bytes;
    uint64_t last_append_at_ns;
    uint64_t last_modified_s;   /* largest LastModified written since open, 0 if none */
    uint64_t last_write_wall_s; /* wall clock of the last extending write since open, 0 if none */
    uint64_t eio_count;         /* consecutive EIO seen */
    uint64_t flush_count;       /* flushes that writes with fsync waited for, since open */
    uint64_t flushed_records;   /* records they covered: over flush_count, how many share one */
    uint32_t vid;
    uint16_t compaction_revision;
    uint8_t version;
    uint8_t offset_width;
    uint8_t no_write;
    uint8_t no_delete;
    uint8_t closed;
    uint8_t flush_failed; /* a flush of .dat failed, once: for PV_VOL_FLUSH_FAILED when the files are opened anew */
} pv_vol_stats;

/* Opens (or creates) a volume: opens both files, reads the super block, loads the map. Checks nothing else (callers use
 * pv_idx_summarize and pv_vol_check_tail first). A missing .idx is created unless PV_VOL_IDX_READONLY. With
 * PV_VOL_CREATE the names are made durable; on failure what was created stays for the caller to remove.
 * With PV_VOL_REMOTE dat_path is a name only: reads answer PV_EINVAL, writes PV_EREADONLY, a delete adds a row with offset 0
 * and no record, as upstream has it for volumes whose data lies in a remote tier.
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
/* Never waits for an append or a flush. Answers for a closed handle too, with the last figures and closed = 1. With
 * PV_VOL_NO_MAP what comes from the map is what pv_vol_set_figures gave and was counted since. */
PV_API int pv_vol_stat(pv_vol *v, pv_vol_stats *out) PV_WUR;
PV_API void pv_vol_superblock(pv_vol *v, pv_superblock *out);
/* Switches writes and deletes off or on; waits for appends and flushes that are under way. Switching on answers
 * PV_EREADONLY for files opened read-only, and PV_ESYS while bytes of a failed append cannot be cut off. */
PV_API int pv_vol_set_readonly(pv_vol *v, uint8_t no_write, uint8_t no_delete) PV_WUR;
/* fdatasync of .dat, then .idx (err->d: 0 = .dat, 1 = .idx). Takes waiting fsync writes along. */
PV_API int pv_vol_sync(pv_vol *v, pv_errinfo *err) PV_WUR;

typedef struct pv_entry {
    uint64_t offset;   /* bytes; 0 = none */
    int32_t size;      /* as in a map */
    uint32_t revision; /* compaction revision the offset belongs to */
} pv_entry;
/* Looks a key up. PV_ENOTFOUND, PV_ECLOSED; with PV_VOL_NO_MAP PV_EINVAL. */
PV_API int pv_vol_lookup(pv_vol *v, uint64_t id, pv_entry *out) PV_WUR;
/* The same without waiting for a disk: PV_EMORE where it would, with a map in a file. */
PV_API int pv_vol_lookup_cached(pv_vol *v, uint64_t id, pv_entry *out) PV_WUR;
/* Copies up to max map entries with key >= from in ascending order (deleted ones included, with negative sizes); returns
 * the count. PV_ECLOSED; with PV_VOL_NO_MAP PV_EINVAL. */
PV_API int pv_vol_visit(pv_vol *v, uint64_t from, pv_idx_row *rows, size_t max) PV_WUR;

enum pv_read_flag {
    PV_READ_DELETED = 1, /* readDeleted: serve a deleted needle whose old size is known */
    PV_READ_META_OK = 2, /* a needle with size > PV_META_ONLY_ABOVE may be read without its data (data == NULL) */
    PV_READ_ENTRY = 4,   /* use *entry instead of the map */
    PV_READ_CACHED = 8 /* do not wait for the disk: PV_ESYS with EAGAIN when not all of the record is in the page cache,
                            with EOPNOTSUPP where the file system cannot tell. Not with PV_READ_META_OK */
};
#define PV_META_ONLY_ABOVE 1048576

typedef struct pv_read {
    pv_needle n;          /* n.data == NULL with meta_only */
    pv_entry entry;       /* where it was found */
    uint64_t data_offset; /* byte offset of Data in .dat */
    uint8_t meta_only;
    uint8_t empty; /* size 0: nothing was read, cookie not checked */
    uint16_t reserved;
    uint32_t reserved2;
    uint8_t *buf; /* gives: free with pv_read_free */
    size_t buf_len;
} pv_read;

/* Reads one needle (contract storage.md 13): lookup, positional read, parse, CRC, one retry at +32 GiB for width 4.
 * The cookie and the ttl are the caller's business. Errors: PV_ENOTFOUND, PV_EDELETED, PV_ESIZE, PV_ECORRUPT, PV_ECRC,
 * PV_EEOF, PV_ESYS, PV_ECLOSED, PV_EMETA, PV_ENOMEM, PV_ESTALE (PV_READ_ENTRY with another revision). On error nothing
 * is given. A version 1 needle has no metadata to read apart: it is always read whole. */
PV_API int pv_vol_read(pv_vol *v, uint64_t id, uint32_t flags, const pv_entry *entry, pv_read *out,
                       pv_errinfo *err) PV_WUR;
PV_API void pv_read_free(pv_read *r);
/* Frees the buf of a pv_read whose other fields are no longer needed. NULL is fine. */
PV_API PV_QUICK void pv_buf_free(uint8_t *buf);
/* Reads len bytes of .dat at a byte offset into buf, if the volume still has that compaction revision (else PV_ESTALE).
 * Short at end of file: PV_EEOF. For streaming large needles. */
PV_API int pv_vol_pread(pv_vol *v, uint64_t offset, uint8_t *buf, size_t len, uint32_t revision,
                        pv_errinfo *err) PV_WUR;

enum pv_write_flag {
    PV_WRITE_CHECK_COOKIE = 1, /* refuse another cookie; without it cookie 0 adopts the stored one */
    PV_WRITE_FSYNC = 2,        /* data on disk before the entry is published and the call returns (group commit) */
    PV_WRITE_NOWAIT = 8, /* PV_ESYS with EAGAIN, and nothing done, instead of a wait of more than a moment for another
                                  change of the volume; one for the disk is not meant */
    PV_WRITE_ENTRY = 4   /* PV_VOL_NO_MAP: *known is the caller's map entry (offset 0 = none). Without it the key
                                  counts as absent. Its revision must be right also if it is none. Calls for one key
                                  must be serialised by the owner of the map.
                                  Not looked at when the handle has a map. */
};

typedef struct pv_write_res {
    uint64_t offset; /* of the record */
    uint64_t append_at_ns;
    int32_t size; /* header Size written */
    uint32_t checksum;
    uint32_t cookie;   /* as written (adopted or given) */
    uint8_t unchanged; /* nothing was written: same cookie, checksum and data are there already */
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
 * error: returns 0 with *deleted_size = -1 and nothing written, unless with PV_WRITE_FSYNC an earlier flush failed: that
 * may have lost the key's tombstone, so it gets another. */
PV_API int pv_vol_delete(pv_vol *v, uint64_t id, uint32_t cookie, uint32_t checksum, uint32_t flags,
                         const pv_entry *known, int32_t *deleted_size, pv_write_res *out, pv_errinfo *err) PV_WUR;
/* One of many deletes (contract grpc.md 5, BatchDelete): what pv_delete_parse found in a line, and what came of it. */
typedef struct pv_delete {
    uint64_t id;
    uint32_t cookie;
    uint32_t vid;
    uint32_t at; /* the line within the text */
    uint32_t len;
    int32_t size; /* the Size of what was deleted, 0 if nothing was; set by pv_vol_delete_many */
    uint8_t ok;   /* the line is a plain file id; else the other fields up to here but at and len are 0 */
    uint8_t reserved[3];
} pv_delete;

enum { PV_DELETE_ANY_COOKIE = 1 }; /* the needle is not read: no cookie test, tombstones have cookie and checksum 0 */

/* Reads file ids `<vid>,<key><cookie>[_<delta>]`, one a line (the last without a newline); with PV_DELETE_ANY_COOKIE one
 * with a `_` is not plain. Returns the number of lines. PV_EINVAL: it is not n, or the text is beyond 32 bits. */
PV_API int pv_delete_parse(const char *text, size_t len, uint32_t flags, pv_delete *out, size_t n) PV_WUR;
/* Deletes a first part of items, in order and as pv_vol_delete would one by one (without PV_WRITE_FSYNC), with one write
 * to each file under one hold of the append mutex: at most 512 items, or as many as 4 MiB of records had to be read of.
 * Returns how many were dealt with. It stops before an item that the caller must take by itself: one that is not plain or
 * of another volume than the first, or (cookie tested) a needle that is gone, cannot be read, has another cookie, is a
 * chunk manifest, or has a time to live; also before a key that came before, or that waits for a flush. 0: that is the
 * first one. A code: nothing was changed, and the caller must take the first by itself to learn what is to be said of it:
 * PV_EINVAL (no map in memory, or no .dat here), PV_EREADONLY, PV_ECLOSED, PV_ENOMEM, PV_ESYS (d as in pv_vol_write). */
PV_API int pv_vol_delete_many(pv_vol *v, pv_delete *items, size_t n, uint32_t flags, pv_errinfo *err) PV_WUR;
/* Writes the results of n items as those of a BatchDeleteResponse: file_id, status (202, or 304 if nothing was deleted),
 * size. Returns the bytes written. PV_EBUFFER: cap is less than 32 * n and the lines' lengths. */
PV_API int64_t pv_delete_answer(const char *text, const pv_delete *items, size_t n, uint8_t *buf, size_t cap) PV_WUR;
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
    int32_t status; /* 0, or PV_ECRC, PV_ECORRUPT, ... of this record's body */
    uint8_t flags;
    uint8_t ttl_count;
    uint8_t ttl_unit;
    uint8_t reserved;
} pv_scan_rec;

/* Reads records of a data file from *offset on, up to max records or end_offset (or the end of the file, if that comes
 * first); advances *offset to where the next call goes on. Returns the count, 0 at a clean end: less than a header is
 * left (*offset tells where). A record that lacks nothing but padding counts as whole, *offset is then behind the end.
 * Header fields are always set; what stands in the body (append time, flags, ttl, data size, checksum) only with
 * check_body, which reads and checks it: status is that record's result (PV_ESYS: the disk would not give the body). A
 * zero-filled region gives records of id 0, cookie 0, size 0. Memory is bounded whatever the sizes in the file say. fd
 * is borrowed. Errors, given only when no record comes before them:
 *   PV_EEOF     the record at *offset is cut off: a = *offset, b = its length, c = bytes left
 *   PV_ECORRUPT a = 0: the header at *offset has a negative Size from which no next record can be found: b = *offset,
 *               c = Size
 *   PV_ESYS, PV_ENOMEM, PV_EVERSION, PV_EINVAL (max 0 or above INT32_MAX) */
PV_API int pv_dat_scan(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, int check_body,
                       pv_scan_rec *recs, size_t max, pv_errinfo *err) PV_WUR;
/* As pv_dat_scan, without giving the records: goes over up to max of them and returns how many, 0 at a clean end. The first
 * error is returned at once, with *offset at the record it is about; with check_body also that of a body (a = *offset,
 * b = id): PV_ECRC, PV_ECORRUPT, ... */
PV_API int pv_dat_walk(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, int check_body, uint32_t max,
                       pv_errinfo *err) PV_WUR;

enum pv_tail_verdict {
    PV_TAIL_OK = 0,
    PV_TAIL_IDX_RAGGED = 1,  /* storage.md 11: "index file's size is %d bytes, maybe corrupted": a = size */
    PV_TAIL_DAT_LONGER = 2,  /* a = actual (rounded up to 8, as upstream counts), b = expected bytes */
    PV_TAIL_DAT_SHORTER = 3, /* a = wanted end, b = actual */
    PV_TAIL_BAD_RECORD = 4   /* err tells: PV_ESIZE, PV_EID, PV_ECRC, PV_ECORRUPT */
};
/* The one-record integrity check of storage.md 11 on files not yet opened as a volume. Returns a verdict >= 0.
 * *last_append_at_ns is set when the record was readable (v3). */
PV_API int pv_vol_check_tail(int dat_fd, int idx_fd, uint8_t width, uint8_t version, uint64_t *last_append_at_ns,
                             pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ vacuum (pv_compact.c) */

/* One vacuum of one volume, driven by one thread at a time: begin, step until 0, finish, commit, free. Names and rules:
 * storage.md 17. Writers and readers go on all the time; writers wait for the end of the commit only. */
typedef struct pv_compact pv_compact;

typedef struct pv_compact_opts {
    const char *cpd_path;        /* borrows; created or truncated */
    const char *cpx_path;        /* borrows; created or truncated */
    pv_superblock superblock;    /* of the new file: revision one more than the old */
    uint32_t volume_ttl_minutes; /* 0: the volume has none */
    uint32_t reserved;
    uint64_t now_s; /* wall clock for the ttl rule */
    uint64_t preallocate_bytes;
} pv_compact_opts;

typedef struct pv_compact_stats {
    uint64_t live_bytes; /* sum of the sizes of what was live when it began */
    uint64_t copied_needles;
    uint64_t read_bytes;
    uint64_t source_offset; /* furthest record copied, in the old file */
    uint64_t expired_needles;
    uint64_t expired_bytes;
    uint64_t dropped_needles; /* unreadable ones, left behind */
    uint64_t dropped_bytes;
    uint64_t first_dropped_key;
    uint64_t first_dropped_offset;
    uint64_t new_dat_bytes;
    uint64_t new_idx_rows;
    uint64_t caught_up_rows; /* keys changed meanwhile and brought over */
    uint64_t caught_up_to;   /* byte offset of the old file up to which rounds without a lock have come */
    int32_t first_dropped_code;
    uint32_t marker_left; /* a failed commit could not remove its marker durably: the handle refuses all changes */
} pv_compact_stats;

typedef struct pv_compact_names {
    const char *cpd_path; /* all borrowed */
    const char *dat_path;
    const char *cpx_path;
    const char *idx_path;
    const char *cpc_path;
    const char *dat_dir;
    const char *idx_dir;
} pv_compact_names;

/* Flushes the volume, notes the state to copy, creates the new files. Gives *out: free with pv_compact_free, which leaves
 * the files. Reads the whole index; takes no lock for longer than a flush. */
PV_API int pv_compact_begin(pv_vol *v, const pv_compact_opts *opts, pv_compact **out, pv_errinfo *err) PV_WUR;
/* Copies until about max_bytes more are written. 1: there is more, 0: all is copied. Unreadable records are left behind
 * and counted; an I/O error ends the vacuum (PV_ESYS). PV_EFULL: the new file would outgrow the offsets. */
PV_API int pv_compact_step(pv_compact *c, uint64_t max_bytes, pv_errinfo *err) PV_WUR;
/* Writes out and flushes both new files. */
PV_API int pv_compact_finish(pv_compact *c, pv_errinfo *err) PV_WUR;
/* Catches up, makes the marker, renames, switches the volume over. 0: done; remove the marker once nothing that belongs to
 * the old files is left. 1: switched, but err tells of a rename or directory flush that failed: keep the marker, the next
 * load finishes. < 0: nothing changed. PV_ESTALE: the volume was vacuumed since begin. */
PV_API int pv_compact_commit(pv_compact *c, const pv_compact_names *names, pv_errinfo *err) PV_WUR;
PV_API void pv_compact_stat(const pv_compact *c, pv_compact_stats *out);
PV_API void pv_compact_free(pv_compact *c);

/* ------------------------------------------------------------------ packing (pv_gzip.c) */

/* in as a gzip stream, byte for byte what upstream's fast level makes of it, into out. PV_EBUFFER: it has more than cap bytes
 * (*out_len then tells nothing): ask with cap = what would be worth keeping. PV_EINVAL: 4 GiB or more. PV_ENOMEM. Takes 700 KiB
 * for the length of the call. */
PV_API int pv_gzip_fast(const uint8_t *in, size_t len, uint8_t *out, size_t cap, size_t *out_len,
                        pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ registry (pv_reg.c) */

/* vid -> volume handle, for lanes that must not ask Python. The registry holds a reference of its own. */
typedef struct pv_reg pv_reg;
PV_API int pv_reg_new(pv_reg **out) PV_WUR;
PV_API void pv_reg_free(pv_reg *r);                                   /* drops its references */
PV_API int pv_reg_publish(pv_reg *r, uint32_t vid, pv_vol *v) PV_WUR; /* PV_EEXISTS */
PV_API int pv_reg_withdraw(pv_reg *r, uint32_t vid) PV_WUR;           /* PV_ENOTFOUND */
/* Gives a reference (pv_vol_unref), or NULL. */
PV_API pv_vol *pv_reg_acquire(pv_reg *r, uint32_t vid) PV_WUR;
/* What a lane must know of a volume besides its handle, which answers for itself whether it takes writes: flags, and the
 * volume's ttl, (uint32_t)count << PV_REG_TTL_COUNT_SHIFT | (uint32_t)unit << PV_REG_TTL_UNIT_SHIFT. */
enum pv_reg_flag {
    PV_REG_SINGLE = 1,           /* one copy: a write or delete concerns no other server */
    PV_REG_COPIES_SHIFT = 8,     /* from this bit on 8 bits: the number of copies there are to be */
    PV_REG_TTL_COUNT_SHIFT = 16, /* from this bit on 8 bits each: the ttl of needles that have none of their own */
    PV_REG_TTL_UNIT_SHIFT = 24
};
PV_API int pv_reg_publish_as(pv_reg *r, uint32_t vid, pv_vol *v, uint32_t flags) PV_WUR;
PV_API pv_vol *pv_reg_acquire_as(pv_reg *r, uint32_t vid, uint32_t *flags) PV_WUR;
PV_API int pv_reg_count(pv_reg *r);

/* ------------------------------------------------------------------ search by append time (pv_since.c) */

/* When the record at a byte offset was appended: 0 for versions 1 and 2, which do not keep it. Neither checksum nor id is
 * looked at. dat_fd is borrowed. Errors: PV_EEOF (the record is not all there), PV_ECORRUPT (a = 0, b = offset, c = Size:
 * negative), PV_EVERSION, PV_ESYS. */
PV_API int pv_dat_append_time(int dat_fd, uint8_t version, uint64_t offset, uint64_t *append_at_ns,
                              pv_errinfo *err) PV_WUR;
/* Finds the first of the first `rows` rows of an index whose record was appended after since_ns. Rows without a record
 * (offset 0) are stepped over. 1: *offset is where the record stands, *row its row. 0: nothing is newer, as always for
 * versions 1 and 2. Reads about log2(rows) rows and records. Both descriptors are borrowed.
 * Errors: those of pv_dat_append_time, with *row and *offset telling where; PV_EEOF with d = 1: the index is shorter. */
PV_API int pv_dat_find_since(int dat_fd, int idx_fd, uint8_t width, uint8_t version, uint64_t rows, uint64_t since_ns,
                             uint64_t *offset, uint64_t *row, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ records for a follower (pv_follow.c) */

#define PV_FOLLOW_RECORD_MAX 262144 /* bytes behind a header; what is longer is not worth a copy more */
#define PV_FOLLOW_GROWTH 10         /* bytes that a message may be longer than its record */
/* Puts records from *offset on into out, each serialised as a VolumeTailSenderResponse of its own, one behind the other:
 * message i ends before ends[i]. Returns how many, up to max. *offset then is where to go on, *last_append_ns the latest
 * append time met if that is later than what it was (version 3). Zero-filled regions are stepped over without a message.
 * Stops, maybe at once, before a record that is long, damaged, cut off or cannot be read, or has a negative size, and at
 * end_offset: 0 with *offset unmoved says that pv_dat_scan must tell what is there. A last record that lacks only padding
 * counts as whole, *offset is then behind the end. Nothing is checked but the places. out is the caller's, of cap bytes, of
 * which max * PV_FOLLOW_GROWTH are not read into. fd is borrowed. Errors: PV_EVERSION, PV_EINVAL (max or cap). */
PV_API int pv_dat_follow(int fd, uint8_t version, uint64_t *offset, uint64_t end_offset, uint8_t *out, size_t cap,
                         uint32_t *ends, size_t max, uint64_t *last_append_ns, pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ maps kept outside (pv_vol.c, pv_live.c) */

/* Sets the figures of the map of a PV_VOL_NO_MAP handle. Every write and delete that is given the entry it finds counts on
 * from them, as upstream's leveldb map does: a put as a file, an overwritten or deleted entry with a size above 0 as deleted.
 * A vacuum keeps them until they are set anew. Errors: PV_ECLOSED, PV_EINVAL (the handle has a map). */
PV_API int pv_vol_set_figures(pv_vol *v, const pv_map_stats *figures) PV_WUR;
/* How many rows the index has, and of which compaction revision it is. Waits while the last ones may still be taken back;
 * rows told of stand as long as the revision does. PV_ECLOSED. */
PV_API int pv_vol_settled_rows(pv_vol *v, uint64_t *rows, uint32_t *revision) PV_WUR;

/* What is live after the first rows of an index, ascending by key: what a map kept outside is made from. */
typedef struct pv_live pv_live;
#define PV_LIVE_ENTRY 20 /* key (8 bytes), offset in bytes (8), size (4), all big-endian */
/* Reads rows [0, max_rows) of the index, all if there are fewer. Gives *out: free with pv_live_free. *stats: upstream's
 * counters of a map made from them (all rows are files, all but the last live row of each key are deleted); entries: how many
 * pv_live_next will give. idx_fd is borrowed for the call only. Errors: PV_ESYS, PV_ENOMEM, PV_EINVAL. */
PV_API int pv_live_open(int idx_fd, uint8_t width, uint64_t max_rows, pv_live **out, pv_map_stats *stats,
                        pv_errinfo *err) PV_WUR;
/* Writes up to max entries of PV_LIVE_ENTRY bytes each to buf; returns the count, 0 at the end. PV_EINVAL: max is 0 or above
 * INT32_MAX. */
PV_API int pv_live_next(pv_live *l, uint8_t *buf, size_t max) PV_WUR;
/* Whether two have the same keys with the same sizes, wherever the records are: 1 or 0. Uses both up. */
PV_API int pv_live_same(pv_live *a, pv_live *b) PV_WUR;
PV_API void pv_live_free(pv_live *l);

/* ------------------------------------------------------------------ erasure coding (pv_ec.c) */

#define PV_EC_MAX_SHARDS 32

/* How a .dat of a volume is cut: large_rows rows of large blocks, then rows of small ones, block i of a row to shard i. */
typedef struct pv_ec_layout {
    uint32_t data_shards;
    uint32_t parity_shards; /* both > 0, together at most PV_EC_MAX_SHARDS */
    uint64_t large_block;
    uint64_t small_block;
    uint64_t large_rows;
} pv_ec_layout;

/* The code: (data + parity) rows of `data` coefficients; the first `data` are the identity. PV_EINVAL: no such ratio. */
PV_API int pv_ec_matrix(uint32_t data, uint32_t parity, uint8_t *matrix, pv_errinfo *err) PV_WUR;
/* A file that a job goes through once. Reads and writes by direct_fd (O_DIRECT; < 0: none) leave the page cache to others;
 * what does not fit it goes by fd, and so does what the cache holds anyway. fd < 0: no such file. */
typedef struct pv_ec_file {
    int32_t fd;
    int32_t direct_fd;
} pv_ec_file;

/* Working memory of the functions below: page-aligned, borrowed for the call, PV_EC_CHUNK bytes for each file that is read
 * or written; one thread uses it at a time. */
#define PV_EC_CHUNK 524288

/* Makes a file so long and reserves its room. Errors: PV_ESYS, PV_EINVAL. */
PV_API int pv_ec_reserve(int fd, uint64_t bytes, pv_errinfo *err) PV_WUR;
/* Makes bytes [from, to) of all shards of a .dat, whose bytes behind dat_bytes count as zero, and writes them to
 * out[shard]. crcs (may be NULL): crcs[shard] goes on over the bytes made. Descriptors are borrowed; no state, so that
 * threads may make different stretches at once. Not synced.
 * Errors: PV_EEOF (the .dat has become shorter), PV_EINVAL (scratch too small among others), PV_ESYS. */
PV_API int pv_ec_encode(const pv_ec_file *dat, uint64_t dat_bytes, const pv_ec_layout *layout, uint64_t from,
                        uint64_t to, const pv_ec_file *out, uint32_t *crcs, void *scratch, size_t scratch_len,
                        pv_errinfo *err) PV_WUR;
/* Makes bytes [from, to) of each shard that is in `out` of the first `data` others that are in `in`; crcs (may be NULL)
 * of all these. As pv_ec_encode otherwise. Errors: PV_ERANGE (a = shards there are, b = needed), PV_EEOF (d = the shard
 * that is too short), PV_EINVAL, PV_ESYS (d = the shard that cannot be read, or
 * PV_EC_MAX_SHARDS). */
PV_API int pv_ec_rebuild(uint32_t data, uint32_t parity, const pv_ec_file *in, const pv_ec_file *out, uint64_t from,
                         uint64_t to, uint32_t *crcs, void *scratch, size_t scratch_len, pv_errinfo *err) PV_WUR;
/* Writes bytes [from, to) of a .dat, taken from its data shards in[0 .. data_shards). Not synced. `from` is a multiple of
 * 4096 where a direct descriptor is to be of use. Errors: PV_EEOF (d = the shard), PV_EINVAL, PV_ESYS. */
PV_API int pv_ec_decode(const pv_ec_file *in, const pv_ec_layout *layout, const pv_ec_file *out, uint64_t from,
                        uint64_t to, void *scratch, size_t scratch_len, pv_errinfo *err) PV_WUR;
/* Goes on with a CRC-32C over bytes [from, to) of a file. Errors: PV_EEOF, PV_EINVAL, PV_ESYS. */
PV_API int pv_ec_sum(const pv_ec_file *file, uint64_t from, uint64_t to, uint32_t *crc, void *scratch,
                     size_t scratch_len, pv_errinfo *err) PV_WUR;
/* Makes len bytes of one shard of the same bytes of `data` others, whose ids ascend. No I/O. PV_EINVAL. */
PV_API int pv_ec_recover(uint32_t data, uint32_t parity, const uint8_t *present, const uint8_t *const *pieces,
                         size_t len, uint8_t wanted, uint8_t *out, pv_errinfo *err) PV_WUR;
/* Reads bytes [from, from + len) of a .dat out of its shards. Where a shard is not there (fds[shard] < 0, one for each of
 * the ratio), its bytes are made of the same ones of the first `data` shards that are. Descriptors are borrowed.
 * Errors: PV_ERANGE (a = shards there are, b = needed), PV_EEOF and PV_ESYS (d = the shard), PV_EINVAL, PV_ENOMEM. */
PV_API int pv_ec_read(const int32_t *fds, const pv_ec_layout *layout, uint64_t from, size_t len, uint8_t *out,
                      pv_errinfo *err) PV_WUR;
/* Writes the live rows of the first `rows` rows of an index by key, one for each key: what replaying the index leaves.
 * Takes 24 bytes of memory for each row, 48 if the index is not sorted. Errors: PV_EEOF, PV_EINVAL, PV_ENOMEM, PV_ESYS. */
PV_API int pv_ecx_from_idx(int idx_fd, uint8_t width, uint64_t rows, int out_fd, uint64_t *live,
                           pv_errinfo *err) PV_WUR;
/* Searches a sorted index. 1: *out is the row (its size may be negative), *index its number; 0: there is none. A file that
 * is not sorted gives one or the other. Errors: PV_EEOF, PV_EINVAL, PV_ESYS. */
PV_API int pv_ecx_find(int fd, uint8_t width, uint64_t rows, uint64_t key, pv_idx_row *out, uint64_t *index,
                       pv_errinfo *err) PV_WUR;

/* ------------------------------------------------------------------ shards to read from (pv_shards.c) */

/* A descriptor that several use; the last of them closes it. References are counted; NULL is fine for ref and unref. */
typedef struct pv_file pv_file;
PV_API int pv_file_new(int fd, pv_file **out) PV_WUR; /* takes fd unless it fails: PV_EINVAL, PV_ENOMEM */
PV_API pv_file *pv_file_ref(pv_file *f);
PV_API void pv_file_unref(pv_file *f);

/* A set of needle ids that only grows, 16 to 32 bytes for each. On any thread; a lock of its own, never held for long. */
typedef struct pv_ids pv_ids;
PV_API int pv_ids_new(pv_ids **out) PV_WUR;
PV_API pv_ids *pv_ids_ref(pv_ids *s);
PV_API void pv_ids_unref(pv_ids *s);
PV_API int pv_ids_add(pv_ids *s, uint64_t id) PV_WUR; /* 1, 0 if it was there, PV_ENOMEM (unchanged then) */
/* Adds ids of 8 bytes each, as a journal has them; half of one at the end is left out. PV_ENOMEM: some may be in it. */
PV_API int pv_ids_add_bytes(pv_ids *s, const uint8_t *ids, size_t len) PV_WUR;
PV_API int pv_ids_has(pv_ids *s, uint64_t id) PV_WUR; /* 1 or 0 */
/* Whether a set has all ids of another: 1 or 0. */
PV_API int pv_ids_covers(pv_ids *s, pv_ids *of) PV_WUR;
PV_API uint64_t pv_ids_count(pv_ids *s);
/* Writes up to max ids, in no order; the number written. */
PV_API uint64_t pv_ids_list(pv_ids *s, uint64_t *out, uint64_t max) PV_WUR;

/* Adds the ids whose rows in a sorted index say that they are deleted. Errors: PV_ESYS, PV_EINVAL, PV_ENOMEM. */
PV_API int pv_ecx_buried(int fd, uint8_t width, uint64_t rows, pv_ids *into, pv_errinfo *err) PV_WUR;

typedef struct pv_shards_opts {
    pv_file *ecx;                     /* the sorted index */
    pv_ids *deleted;                  /* what the journal says; goes on to grow */
    pv_file *files[PV_EC_MAX_SHARDS]; /* NULL: not on this server */
    pv_ec_layout layout;
    uint64_t rows;   /* of the index */
    uint8_t width;   /* 4 or 5 */
    uint8_t version; /* 1 to 3 */
} pv_shards_opts;

/* What this server has of an erasure coded volume. It takes references of its own on all that opts names and never changes
 * but by pv_shards_elsewhere. On any thread. */
typedef struct pv_shards pv_shards;
PV_API int pv_shards_new(const pv_shards_opts *opts, pv_shards **out) PV_WUR; /* PV_EINVAL, PV_ENOMEM */
PV_API pv_shards *pv_shards_ref(pv_shards *s);
PV_API void pv_shards_unref(pv_shards *s);
/* Tells which shards other servers have (bits), and how long that is to be believed. Before the first call, and when that
 * time is over, no shard is made of others. */
PV_API void pv_shards_elsewhere(pv_shards *s, uint32_t shards, uint32_t ttl_ms);
/* Finds a live needle. flags: PV_READ_CACHED. Errors: PV_ENOTFOUND, PV_EDELETED, PV_EEOF, PV_ESYS (EAGAIN and EOPNOTSUPP with
 * PV_READ_CACHED). */
PV_API int pv_shards_find(pv_shards *s, uint64_t id, uint32_t flags, pv_idx_row *row, pv_errinfo *err) PV_WUR;
/* Reads the record of a row that pv_shards_find gave, made of other shards here where its own is nowhere; the checksum is
 * verified, the cookie is the caller's business. With PV_READ_CACHED, PV_ESYS with EAGAIN stands for much to be made, too. On
 * success free with pv_read_free. Errors: PV_ERANGE (not enough shards here), those of pv_needle_parse, PV_EEOF, PV_ESYS,
 * PV_EINVAL, PV_ENOMEM. */
PV_API int pv_shards_read(pv_shards *s, const pv_idx_row *row, uint32_t flags, pv_read *out, pv_errinfo *err) PV_WUR;
/* As pv_reg_publish and pv_reg_acquire, for what this server has of an erasure coded volume; an id is one or the other. */
PV_API int pv_reg_publish_shards(pv_reg *r, uint32_t vid, pv_shards *s) PV_WUR; /* PV_EEXISTS */
PV_API pv_shards *pv_reg_acquire_shards(pv_reg *r, uint32_t vid);

/* ------------------------------------------------------------------ scrub (pv_scrub.c) */

/* One look through a volume's index and, if asked for, all records that it names: what the contract calls INDEX and FULL
 * (storage.md 24). Driven by one thread at a time: begin, step until 0, drain the findings after each step, free. Holds
 * descriptors of its own and no lock, so the volume may be written to, vacuumed or closed meanwhile. What was appended
 * after begin is not looked at. Records are read in the order of their offsets in large pieces. An index whose rows do
 * not stand in that order is held in memory, 24 bytes a row, until the end; any other is streamed. */
typedef struct pv_scrub pv_scrub;

enum pv_scrub_flag {
    PV_SCRUB_INDEX_ONLY = 1, /* do not read records */
    PV_SCRUB_CHECK_ID = 2,   /* a record's id must be its row's key (upstream does not look) */
    PV_SCRUB_ANY_INDEX = 4   /* idx_fd need not be the file that the volume appends to */
};

typedef struct pv_scrub_opts {
    pv_vol *vol;    /* borrows for the call; NULL: dat_fd, width and version say what to look at */
    int32_t dat_fd; /* borrows for the call */
    int32_t idx_fd; /* borrows for the call */
    uint8_t width;
    uint8_t version;
    uint16_t reserved;
    uint32_t flags;
    uint64_t resume_offset; /* records before it are not read again: `position` of an earlier scrub of this file */
} pv_scrub_opts;

enum pv_scrub_kind {
    PV_SCRUB_OVERLAP = 1, /* row begins at or before other_end, where the record of other_key ends */
    PV_SCRUB_RECORD = 2   /* the record cannot be read: error tells why */
};

typedef struct pv_scrub_finding {
    uint64_t row; /* number in the index, from 0 */
    uint64_t key;
    uint64_t offset;
    uint64_t end; /* last byte, as upstream counts: a tombstone's row has the length that its size -1 gives */
    uint64_t other_key;
    uint64_t other_offset;
    uint64_t other_end;
    int32_t kind;
    int32_t size;
    pv_errinfo error;
} pv_scrub_finding;

typedef struct pv_scrub_stats {
    uint64_t idx_bytes;      /* length of the index */
    uint64_t rows;           /* whole rows in it */
    uint64_t dat_bytes;      /* length of the data that the rows are about */
    uint64_t expected_bytes; /* what the rows add up to, with 8 for a super block; known once all rows were seen */
    uint64_t position;       /* all records before this offset were read */
    uint64_t done_rows;      /* steps of the work: done_rows of total_rows */
    uint64_t total_rows;
    uint64_t checked_records;
    uint64_t bad_records;
    uint64_t read_bytes; /* from both files */
    uint32_t revision;   /* compaction revision of the volume; 0 without one */
    uint8_t in_order;    /* rows stand in the order of their records */
    uint8_t reserved[3];
} pv_scrub_stats;

/* Takes the lengths of both files at one moment between two appends. Gives *out: free with pv_scrub_free.
 * Errors: PV_ECLOSED; PV_ESTALE (idx_fd is not the volume's index: it was vacuumed since, or somebody replaced the file);
 * PV_ERANGE (more than 2^32 - 1 rows); PV_EVERSION, PV_EINVAL, PV_ENOMEM, PV_ESYS. */
PV_API int pv_scrub_begin(const pv_scrub_opts *opts, pv_scrub **out, pv_errinfo *err) PV_WUR;
/* Reads about max_bytes (at least one record or one batch of rows). 1: there is more, 0: all was looked at. A record that
 * cannot be read is a finding; errors (PV_ESYS of the index, PV_ENOMEM) end the scrub. */
PV_API int pv_scrub_step(pv_scrub *s, uint64_t max_bytes, pv_errinfo *err) PV_WUR;
/* Moves up to max findings out, in the order met; returns the count. A step ends early while many wait here. */
PV_API int pv_scrub_findings(pv_scrub *s, pv_scrub_finding *out, size_t max) PV_WUR;
PV_API void pv_scrub_stat(const pv_scrub *s, pv_scrub_stats *out);
PV_API void pv_scrub_free(pv_scrub *s);

/* ------------------------------------------------------------------ HTTP semantics (pv_http.c) */
/* BEGIN pv_http
 *
 * What a needle's HTTP exchange means, for every lane: pure functions on bytes, no I/O, no state, no allocation (but
 * for pv_mime). Any thread may call them at any time. Section numbers are those of contract/http.md.
 *
 * Rendering functions (result size_t) return the length of the whole text and write it only if it fits into cap bytes;
 * no NUL is added. A result above cap means: nothing useful was written, give more room.
 * Header values given to these functions are the first value of that name, without blanks around it; an absent header
 * is an empty text.
 */

/* Bytes that belong to someone else. p may be NULL when n is 0. */
typedef struct pv_text {
    const char *p;
    size_t n;
} pv_text;

/* -- file ids in paths (4) */

enum pv_url_kind {
    PV_URL_NEEDLE = 0,   /* vid and fid were cut out (whether they are numbers is for pv_vid_parse, pv_fid_parse) */
    PV_URL_VID_ONLY = 1, /* no fid: the whole last segment is in vid */
    PV_URL_BAD = 2,      /* four or more slashes and a comma: answer 400 (departure A2). vid is a text that pv_vid_parse
                            refuses, so a caller that goes on with it gets a fitting error text */
    PV_URL_DROP = 3      /* a dot before the comma of /vid,fid: upstream closes the connection without an answer. To
                            treat it as PV_URL_BAD is right, too (17): vid is as there */
};

typedef struct pv_url {
    int32_t kind;    /* enum pv_url_kind */
    int32_t unclean; /* 1: the path holds an empty, "." or ".." element, for which a GET etc. is answered 307 (2) */
    pv_text path;    /* percent-decoded */
    pv_text vid;
    pv_text fid;       /* with its _delta */
    pv_text filename;  /* only of /vid/fid/filename */
    pv_text ext;       /* with its dot, or empty */
    pv_text claim_fid; /* fid cut at its last '_' (not at index 0): what a token's claim is compared with (5.2) */
} pv_url;

/* Takes a request path as sent (percent-encoded, without query) apart. Borrows raw and buf; the texts of out point into
 * raw when it holds no '%', else into buf. Errors: PV_EPARSE (bad escape, b = where), PV_EBUFFER (cap < raw_len). */
PV_API PV_QUICK int pv_url_parse(const char *raw, size_t raw_len, char *buf, size_t cap, pv_url *out,
                                 pv_errinfo *err) PV_WUR;
/* The fid as POST and PUT see it: behind the last comma up to the last dot behind that (no comma: the whole path).
 * path is decoded; *fid points into it. */
PV_API PV_QUICK void pv_url_write_fid(const char *path, size_t n, pv_text *fid);

enum pv_id_code {
    PV_ID_OK = 0,
    PV_ID_VID_SYNTAX = 1,
    PV_ID_VID_RANGE = 2, /* above 32 bits (departure A3) */
    PV_ID_FID_INVALID = 3,
    PV_ID_SHORT = 4,
    PV_ID_LONG = 5,
    PV_ID_KEY = 6,
    PV_ID_COOKIE = 7,
    PV_ID_DELTA_SYNTAX = 8,
    PV_ID_DELTA_RANGE = 9,
    PV_ID_DELTA_OVERFLOW = 10
};

typedef struct pv_id_error {
    int32_t code; /* enum pv_id_code */
    int32_t reserved;
    pv_text text; /* the offending text, borrowed from the input */
    uint64_t key;
    uint64_t delta;
} pv_id_error;

/* 0, or PV_EPARSE with *e filled (e may be NULL). */
PV_API PV_QUICK int pv_vid_parse(const char *p, size_t n, uint32_t *vid, pv_id_error *e) PV_WUR;
PV_API PV_QUICK int pv_fid_parse(const char *p, size_t n, uint64_t *key, uint32_t *cookie, pv_id_error *e) PV_WUR;
/* Upstream's text for a refused id, as it stands in {"error":...} before JSON escaping, raw bytes of the input kept. */
PV_API PV_QUICK size_t pv_fid_error_text(const pv_id_error *e, char *buf, size_t cap);

/* -- ranges (6.8) */

/* start and length are within the data, except for the odd "bytes=--n", which upstream answers as a single range with a
 * start behind the end and a length of -n: nothing is sent then. */
typedef struct pv_range {
    int64_t start;
    int64_t length;
} pv_range;

enum pv_range_kind {
    PV_RANGE_NONE = 0, /* no Range header */
    PV_RANGE_SINGLE = 1,
    PV_RANGE_MULTI = 2,
    PV_RANGE_INVALID = 3, /* 416 */
    PV_RANGE_EMPTY = 4,   /* 200 with an empty body: no range in it, or more bytes asked for than there are */
    PV_RANGE_OUTSIDE = 5  /* 416 with another text: "bytes=--n" among several */
};

/* Returns the kind. *count: how many ranges there are (0 unless SINGLE or MULTI); the first max of them are stored. */
PV_API PV_QUICK int pv_range_parse(const char *p, size_t n, uint64_t total, pv_range *ranges, size_t max,
                                   size_t *count) PV_WUR;
/* "bytes 0-4/11"; an empty range at 0 of nothing is "bytes 0--1/0". */
PV_API PV_QUICK size_t pv_content_range(const pv_range *r, uint64_t total, char *buf, size_t cap);

/* -- dates, entity tags, conditions (6.3) */

/* "Mon, 02 Jan 2006 15:04:05 GMT" (29 bytes, more after the year 9999). */
PV_API PV_QUICK size_t pv_http_date(int64_t unix_s, char *buf, size_t cap);
/* Only that form, with the leeway Go's parser gives it (any weekday name, letter case, fractions). 0 or PV_EPARSE. */
PV_API PV_QUICK int pv_http_date_parse(const char *p, size_t n, int64_t *unix_s) PV_WUR;
/* Ten bytes: quote, 8 lower-case hex digits, quote. */
PV_API PV_QUICK size_t pv_etag(uint32_t checksum, char *buf, size_t cap);
/* 1: answer 304; 0: go on. last_modified_s 0 = none. */
PV_API PV_QUICK int pv_cond_eval(pv_text if_modified_since, pv_text if_none_match, uint64_t last_modified_s,
                                 uint32_t checksum) PV_WUR;

/* -- media types (13) */

/* `inline; filename=a.json`, quoted or encoded as 13.1 says. */
PV_API PV_QUICK size_t pv_content_disposition(int attachment, const char *name, size_t n, char *buf, size_t cap);
/* Type by content of the first 512 bytes (13.2); never NULL, static storage. */
PV_API PV_QUICK const char *pv_sniff(const uint8_t *data, size_t len);

/* Types by extension (13.3). Built once, then only read: pv_mime_new has Go's built-in types; the caller adds those of
 * the system's files; pv_mime_seal puts the upstream binary's own list on top. Then any thread may look up. */
typedef struct pv_mime pv_mime;
/* Gives a table; free with pv_mime_free. PV_ENOMEM. */
PV_API int pv_mime_new(pv_mime **out) PV_WUR;
PV_API void pv_mime_free(pv_mime *m);
/* ext with its dot. only_new: not if this very extension is known (globs2), else it replaces (mime.types). A type that
 * is none is ignored as Go does. 1 added, 0 ignored, PV_ENOMEM, PV_EINVAL (sealed). */
PV_API int pv_mime_add(pv_mime *m, const char *ext, size_t ext_len, const char *type, size_t type_len,
                       int only_new) PV_WUR;
PV_API int pv_mime_seal(pv_mime *m) PV_WUR; /* 0, PV_ENOMEM */
/* As written, then in lower case. 1 and *type (lives as long as m), or 0 and an empty text. m must be sealed. */
PV_API PV_QUICK int pv_mime_lookup(const pv_mime *m, const char *ext, size_t ext_len, pv_text *type);
/* Extension of a name: from the last dot of its last element, dot included; empty if none. */
PV_API PV_QUICK void pv_name_ext(const char *name, size_t n, pv_text *ext);

/* -- answer to GET and HEAD (6.3-6.8) */

/* The response-* query parameters, in the order of pv_get_req.overrides. */
enum pv_override {
    PV_OVR_CACHE_CONTROL = 0,
    PV_OVR_CONTENT_DISPOSITION = 1,
    PV_OVR_CONTENT_ENCODING = 2,
    PV_OVR_CONTENT_LANGUAGE = 3,
    PV_OVR_CONTENT_TYPE = 4,
    PV_OVR_EXPIRES = 5
};

enum pv_get_flag {
    PV_GET_HEAD = 1,
    PV_GET_ATTACHMENT = 2, /* dl=true */
    PV_GET_CHUNKED = 4 /* a chunk manifest that is expanded: the needle's name, mime and data_len are the manifest's,
                              stored compression plays no part, X-File-Store is sent (6.10) */
};

typedef struct pv_get_req {
    pv_text filename; /* of the URL */
    pv_text accept_encoding;
    pv_text range;
    pv_text if_modified_since;
    pv_text if_none_match;
    pv_text overrides[6];    /* p == NULL: absent; n == 0 with p: given, but empty */
    const uint8_t *random30; /* 30 random bytes for the multipart boundary */
    uint32_t flags;          /* enum pv_get_flag */
    uint32_t reserved;
} pv_get_req;

typedef struct pv_get_needle {
    pv_text name;
    pv_text mime;
    pv_text pairs;       /* JSON as stored; looked at if flags has PV_F_PAIRS */
    const uint8_t *data; /* the whole data, or NULL if it will be streamed */
    uint64_t data_len;
    uint64_t last_modified_s; /* 0 = none (also of an empty needle, which was never read) */
    const uint8_t *sniff;     /* after PV_GET_NEED_SNIFF: bytes of the data beginning at sniff_offset */
    size_t sniff_len;
    uint64_t sniff_offset;
    uint32_t checksum; /* 0 for an empty needle */
    uint8_t flags;     /* of the needle */
    uint8_t plain;     /* 1: data is what the client shall get (was decompressed, resized, ...) */
    uint8_t reserved[2];
} pv_get_needle;

/* One stretch of a body: text_len bytes of the plan's buffer from text_offset, then data_len bytes of the data. */
typedef struct pv_body_part {
    uint64_t data_offset;
    uint64_t data_len;
    size_t text_offset;
    size_t text_len;
} pv_body_part;

enum pv_plan_flag {
    PV_PLAN_NO_LENGTH = 1,  /* no Content-Length, so chunked: 206 of several ranges with Content-Encoding, above 2 KiB;
                               206 of "bytes=--n" */
    PV_PLAN_HAS_SERVER = 2, /* a stored pair set this header: it stands in the block, the lane adds none of its own */
    PV_PLAN_HAS_DATE = 4,
    PV_PLAN_HAS_REQUEST_ID = 8,
    PV_PLAN_HAS_ALLOW_ORIGIN = 16,
    PV_PLAN_HAS_ALLOW_CREDENTIALS = 32,
    PV_PLAN_HAS_CONNECTION = 64,
    PV_PLAN_CLOSE = 128 /* that one says close */
};

typedef struct pv_plan {
    int32_t status;
    uint32_t flags;       /* enum pv_plan_flag */
    size_t head_len;      /* buf[0, head_len): header lines, each "Name: value\r\n"; no status line, no blank line */
    size_t parts;         /* entries of parts[]; 0 for no body (always with HEAD and 304) */
    uint64_t body_len;    /* bytes of the body */
    uint64_t need_offset; /* PV_GET_NEED_SNIFF: give need_len bytes of the data from here */
    uint64_t need_len;
} pv_plan;

enum pv_get_result {
    PV_GET_DONE = 0,
    PV_GET_NEED_PLAIN = 1, /* decompress the data (gzip; nothing at all if that fails), set plain, ask again */
    PV_GET_NEED_SNIFF = 2  /* read bytes for the Content-Type, set sniff, sniff_len, sniff_offset, ask again */
};

/* Status, headers and body of a needle that was found and whose cookie fits. Not in the block: Date, Server,
 * X-Amz-Request-Id, CORS, Connection (but see flags). Pairs named Content-Length or Transfer-Encoding are not sent:
 * a stored needle must not change how the bytes of an answer are framed.
 * Returns enum pv_get_result. Errors: PV_EBUFFER (a = bytes of buf that will do, b = entries of parts that will do),
 * PV_EINVAL (compressed needle without data, data_len of 2^63 or more, no random30 where one is needed). mime may be
 * NULL (no type by extension). */
PV_API PV_QUICK int pv_get_plan(const pv_get_req *req, const pv_get_needle *n, const pv_mime *mime, char *buf,
                                size_t cap, pv_body_part *parts, size_t max_parts, pv_plan *out,
                                pv_errinfo *err) PV_WUR;

/* -- uploads (8) */

/* What Go's form parser makes of Content-Type before a POST or PUT is looked at (8.1): 1 = the body is form fields and
 * is eaten, 0 = it is not, PV_EPARSE = answer 400 with the text *message (static storage). */
PV_API PV_QUICK int pv_form_check(const char *content_type, size_t n, pv_text *message) PV_WUR;

typedef struct pv_upload_req {
    pv_text method;
    pv_text content_type;
    pv_text content_disposition;
    pv_text content_encoding;
    pv_text content_md5;
    pv_text path;        /* decoded */
    const uint8_t *body; /* whole body; empty when pv_form_check said 1 */
    size_t body_len;
    uint64_t size_limit; /* bytes, of -fileSizeLimitMB */
    const pv_mime *mime; /* may be NULL */
    uint8_t is_manifest; /* cm */
    uint8_t reserved[7];
} pv_upload_req;

typedef struct pv_upload {
    const uint8_t *data; /* in the body */
    size_t data_len;
    pv_text name; /* may be 256 bytes or longer: not stored then (8.5); the same for mime */
    pv_text mime;
    pv_text md5;        /* expected Content-MD5, of the request or else of the part; empty: none */
    pv_text message;    /* with PV_EPARSE: the text of the 400 answer */
    size_t decoded_len; /* bytes pv_qp_decode will give; without quoted data_len */
    uint8_t is_multipart;
    uint8_t is_gzipped; /* the client says that data is gzip */
    uint8_t quoted;     /* data is quoted-printable: pv_qp_decode it first */
    uint8_t reserved[5];
} pv_upload;

/* Finds the file in an upload. Borrows all; texts of out point into the request's texts, the body, the mime table or
 * scratch. Errors: PV_EPARSE (message), PV_EBUFFER (a = bytes of scratch to try next, at least twice cap; 4096 do for
 * ordinary requests). */
PV_API int pv_upload_parse(const pv_upload_req *req, char *scratch, size_t cap, pv_upload *out, pv_errinfo *err) PV_WUR;
/* Decodes what pv_upload_parse called quoted; cap is at least decoded_len. Returns 0 and *out_len, PV_EBUFFER, or
 * PV_EPARSE for what pv_upload_parse would have refused. out may be in. */
PV_API int pv_qp_decode(const uint8_t *in, size_t len, uint8_t *out, size_t cap, size_t *out_len) PV_WUR;

/* 1 if upstream would gzip such an upload (8.4). name: base name, mime: candidate or empty (then data is sniffed). */
PV_API PV_QUICK int pv_should_compress(pv_text name, pv_text mime, const uint8_t *data, size_t len) PV_WUR;

typedef struct pv_header {
    pv_text name;
    pv_text value;
} pv_header;

/* JSON of the Seaweed-* headers (8.7). order is room for count numbers. Returns 1 and *len; 0 if there are none or the
 * JSON would have 65536 bytes or more; PV_EBUFFER (65536 are always enough). */
PV_API PV_QUICK int pv_pairs_build(const pv_header *headers, size_t count, uint32_t *order, char *buf, size_t cap,
                                   size_t *len) PV_WUR;
/* Reads such JSON the way the reading side does (6.5): a value that is no string counts as "". *count: how many members
 * there are; the first max are stored, in order, repeated names kept. Names and values are decoded into buf (3 * n
 * bytes always do). 0, PV_EPARSE (not JSON, b = position; or no object), PV_EBUFFER. */
PV_API int pv_pairs_parse(const char *json, size_t n, char *buf, size_t cap, pv_header *pairs, size_t max,
                          size_t *count, pv_errinfo *err) PV_WUR;

/* ttl text (8.6): 1 and the stored form, or 0 and zeros (none, bad or zero). */
PV_API PV_QUICK int pv_ttl_parse(const char *p, size_t n, uint8_t *count, uint8_t *unit) PV_WUR;
/* ts: unsigned decimal; 0 for a text that is none, UINT64_MAX above 64 bit. */
PV_API PV_QUICK uint64_t pv_ts_parse(const char *p, size_t n);
/* Go's ParseBool: 1, 0 (PV_EPARSE for another text). */
PV_API PV_QUICK int pv_bool_parse(const char *p, size_t n) PV_WUR;
/* Go's ParseInt(p, 10, 64): 0, PV_EPARSE (0 in *v), PV_ERANGE (the nearest limit in *v). */
PV_API PV_QUICK int pv_int_parse(const char *p, size_t n, int64_t *v) PV_WUR;

/* {"name":...,"size":...,"eTag":...,"mime":...,"contentMd5":...}, empty ones and size 0 left out (8.8). */
PV_API PV_QUICK size_t pv_write_reply(pv_text name, uint32_t size, uint32_t checksum, pv_text mime, pv_text md5,
                                      char *buf, size_t cap);

/* -- texts (3) */

/* Go's JSON string, quotes included: < > & U+2028 U+2029 escaped, invalid UTF-8 becomes \ufffd. */
PV_API PV_QUICK size_t pv_json_escape(const char *p, size_t n, char *buf, size_t cap);
/* Go's %q. */
PV_API PV_QUICK size_t pv_go_quote(const char *p, size_t n, char *buf, size_t cap);
/* Header name in Go's canonical case; one that is no token stays as it is. */
PV_API PV_QUICK size_t pv_header_canonical(const char *p, size_t n, char *buf, size_t cap);
/* X-Amz-Request-Id: upper-case hex of ns, then 8 digits of random32. */
PV_API PV_QUICK size_t pv_request_id(uint64_t ns, uint32_t random32, char *buf, size_t cap);
/* END pv_http */

/* ------------------------------------------------------------------ fast lane (pv_lane.c) */

/* Threads that own listening sockets of plain HTTP, answer what needs no decision of Python's, and hand every other
 * connection over, with the bytes read so far and before any side effect. An answer is byte for byte the other lane's.
 * All functions may be called from any thread. */
typedef struct pv_lane pv_lane;

enum pv_lane_serve {
    PV_LANE_READS = 1, /* GET and HEAD */
    PV_LANE_WRITES = 2 /* PUT, POST and DELETE */
};

enum pv_lane_conn_flag {
    PV_LANE_PUBLIC = 1, /* of the public port: GET and HEAD only */
    PV_LANE_SERVED = 2, /* a request was answered on the connection */
    PV_LANE_LENIENT = 4 /* the last one was a POST: line ends may follow it */
};

/* Why a connection was handed over. */
enum pv_lane_reason {
    PV_LANE_WHY_HEAD = 0,   /* not recognised */
    PV_LANE_WHY_OFF = 1,    /* the method is not served now */
    PV_LANE_WHY_QUERY = 2,  /* a parameter that means something */
    PV_LANE_WHY_PATH = 3,   /* no plain file id */
    PV_LANE_WHY_VOLUME = 4, /* not published, or with replicas */
    PV_LANE_WHY_NEEDLE = 5, /* absent, deleted, expired, another cookie, unreadable, a manifest, has pairs */
    PV_LANE_WHY_ANSWER = 6, /* to be unpacked, or of an unusual form */
    PV_LANE_WHY_UPLOAD = 7, /* a form, gzip, to be packed, md5, an image to be turned */
    PV_LANE_WHY_WRITE = 8,  /* the engine refused it */
    PV_LANE_WHY_SIZE = 9,   /* body or needle above the lane's budget */
    PV_LANE_WHY_EOF = 10,   /* the client closed its side within a request */
    PV_LANE_WHY_STOP = 11,  /* the lane stops and the request is not complete */
    PV_LANE_WHY_COPY = 12   /* written here, but not known to be on all replicas: to be done again */
};

#define PV_LANE_METHODS 5  /* GET, HEAD, PUT, POST, DELETE */
#define PV_LANE_STATUSES 7 /* 200, 201, 202, 204, 206, 304, 416 */
#define PV_LANE_BUCKETS 25 /* seconds up to 0.0001 * 2^i; the last one takes the rest */
#define PV_LANE_REASONS 13

typedef struct pv_lane_opts {
    pv_reg *registry;          /* must outlive the lane, as must mime */
    const pv_mime *mime;       /* may be NULL */
    const char *server;        /* copied: value of the Server header */
    uint64_t size_limit_bytes; /* of -fileSizeLimitMB */
    uint64_t body_bytes;       /* largest body, and largest needle, that is served here */
    uint64_t budget_bytes;     /* bodies and unsent answers in memory, over all connections */
    uint32_t idle_timeout_ms;  /* 0: never */
    uint32_t threads;          /* at least 1 */
    uint32_t io_threads;       /* at least 1: for reads that miss the page cache, and large writes */
    uint32_t sync_threads;     /* at least 1: for writes that are flushed before they are answered */
    uint32_t max_connections;
    uint32_t mailbox; /* connections that wait to be taken over, at most */
    uint32_t serve;   /* enum pv_lane_serve */
    uint8_t fix_orientation;
    uint8_t reserved[3];
} pv_lane_opts;

/* A connection that was handed over. */
typedef struct pv_lane_item {
    int32_t fd;     /* gives: the taker closes it */
    uint32_t flags; /* enum pv_lane_conn_flag */
    uint8_t *data;  /* gives: free the item with pv_lane_item_free; NULL if size is 0 */
    size_t size;
    uint64_t charged; /* of the budget; given back by pv_lane_item_free */
    uint32_t reason;  /* enum pv_lane_reason */
    uint16_t port;
    char host[46]; /* address as text, ends with NUL */
} pv_lane_item;

typedef struct pv_lane_stats {
    uint64_t connections; /* now */
    uint64_t accepted;
    uint64_t given; /* came back from the other lane */
    uint64_t idle_closed;
    uint64_t accept_pauses;
    uint64_t mailbox_full; /* refused with 503 */
    uint64_t yields;       /* a pipeline gave way to other connections */
    uint64_t io_jobs;
    uint64_t received_bytes;
    uint64_t sent_bytes;
    uint64_t held_bytes;                                       /* of the budget, now */
    uint64_t handed_over[PV_LANE_REASONS];                     /* by enum pv_lane_reason */
    uint64_t requests[2 * PV_LANE_METHODS * PV_LANE_STATUSES]; /* [public][method][status] */
    uint64_t nanoseconds[2 * PV_LANE_METHODS];
    uint64_t latency[2 * PV_LANE_METHODS * PV_LANE_BUCKETS]; /* not cumulated */
    uint64_t copied;                                         /* writes that went to replicas, too */
    uint64_t copies;                                         /* replicas they went to */
    uint64_t copy_nanoseconds;                               /* from the begin of the local write on */
    uint64_t copy_latency[PV_LANE_BUCKETS];
} pv_lane_stats;

/* Gives a lane without sockets and threads; free with pv_lane_free. PV_ENOMEM, PV_EINVAL, PV_ESYS. */
PV_API int pv_lane_new(const pv_lane_opts *opts, pv_lane **out) PV_WUR;
/* Takes a listening, non-blocking socket; before pv_lane_start. flags: PV_LANE_PUBLIC or 0. PV_EINVAL (more than two). */
PV_API int pv_lane_listen(pv_lane *l, int fd, uint32_t flags) PV_WUR;
/* Starts the threads. PV_ESYS, PV_ENOMEM: nothing runs. */
PV_API int pv_lane_start(pv_lane *l) PV_WUR;
/* What is served from now on. A request that began to be served before this returned may still end. */
PV_API PV_QUICK void pv_lane_serve(pv_lane *l, uint32_t serve);
/* Where the other copies of a volume are, as `address:port` with one blank between, addresses as numbers, at most four; for
 * ttl_ms from now. Writes of the volume are then copied by the lane; "" and PV_EINVAL (anything else): by the other lane. */
PV_API int pv_lane_replicas(pv_lane *l, uint32_t vid, const char *hosts, uint32_t ttl_ms) PV_WUR;
/* Takes a connection (back), idle, with nothing unread. flags: enum pv_lane_conn_flag. PV_ECLOSED when stopping,
 * PV_ENOMEM and PV_ESYS: the descriptor stays the caller's. */
PV_API PV_QUICK int pv_lane_give(pv_lane *l, int fd, uint32_t flags) PV_WUR;
/* A descriptor, the lane's own, that is readable while there may be connections to take over, and from the end on. */
PV_API PV_QUICK int pv_lane_mail_fd(const pv_lane *l);
/* Connections to take over: the count, 0 when none wait. PV_ECLOSED: the lane has stopped and all were taken. Never waits. */
PV_API PV_QUICK int pv_lane_take(pv_lane *l, pv_lane_item *items, size_t max) PV_WUR;
PV_API PV_QUICK void pv_lane_item_free(pv_lane *l, pv_lane_item *item); /* not its fd */
/* Stops reading: closes the listening sockets after serving who is in their queues, closes idle connections, hands the
 * others over. Returns when that is done, so that what is left needs no taker; answers are still being sent then. */
PV_API void pv_lane_quiesce(pv_lane *l);
/* The same, then waits up to deadline_ms for answers to be sent, cuts the rest and ends the threads. The number that was
 * cut. Idempotent. */
PV_API int pv_lane_stop(pv_lane *l, uint32_t deadline_ms);
PV_API void pv_lane_stat(pv_lane *l, pv_lane_stats *out);
PV_API void pv_lane_free(pv_lane *l); /* stops it first. Nobody may be in another call. NULL is fine */

#endif
