/* pv_io.c - every system call of the engine that touches a file.
 *
 * One place, so that transfers are complete or reported, errno is never lost, and a test build can log or break any of
 * them (pv_int.h, PV_TEST_HOOKS). Positional I/O only; no state, no locks.
 */
#include "pv_int.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* One transfer moves at most this much: below the kernel's own limit (0x7ffff000), and a whole number of pages. */
#define IO_CHUNK ((size_t)1 << 30)

#ifdef PV_TEST_HOOKS
static pv__io_hook hook_fn;
static void *hook_ctx;

void pv__io_set_hook(pv__io_hook hook, void *ctx) {
    hook_ctx = ctx;
    __atomic_store_n(&hook_fn, hook, __ATOMIC_SEQ_CST);
}

#define HOOK(len, ...) call_hook(&(const pv__io_event){__VA_ARGS__}, (len))

static int call_hook(const pv__io_event *ev, size_t *len) {
    pv__io_hook hook = __atomic_load_n(&hook_fn, __ATOMIC_SEQ_CST);
    return hook == NULL ? 0 : hook(hook_ctx, ev, len);
}
#else
#define HOOK(len, ...) ((void)(len), 0)
#endif

/* Runs a call that gives -1 and errno, again after EINTR; the hook is asked each time. */
#define RETRY(rc, hook, call)                                                                                          \
    do {                                                                                                               \
        int hook_errno = (hook);                                                                                       \
        if (hook_errno != 0) {                                                                                         \
            errno = hook_errno;                                                                                        \
            (rc) = -1;                                                                                                 \
        } else {                                                                                                       \
            (rc) = (call);                                                                                             \
        }                                                                                                              \
    } while ((rc) < 0 && errno == EINTR)

static int span_ok(uint64_t offset, size_t len) {
    return offset <= PV__OFF_MAX && len <= PV__OFF_MAX - offset;
}

int pv__io_open(const char *path, int flags, unsigned mode, int *fd, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_OPEN, .fd = -1, .path = path), open(path, flags | O_CLOEXEC, (mode_t)mode));
    if (rc < 0) {
        *fd = -1;
        return pv__fail_sys(err, errno, (uint64_t)(unsigned)flags, 0, 0);
    }
    *fd = rc;
    return 0;
}

int pv__io_close(int fd, pv_errinfo *err) {
    if (fd < 0) {
        return 0;
    }
    size_t len = 0;
    int hook_errno = HOOK(&len, .op = PV__IO_CLOSE, .fd = fd);
    int rc = close(fd);
    if (hook_errno != 0) {
        errno = hook_errno;
        rc = -1;
    }
    /* Linux frees the descriptor before it can be interrupted: EINTR is no failure, and no reason to close again. */
    if (rc < 0 && errno != EINTR) {
        return pv__fail_sys(err, errno, 0, 0, 0);
    }
    return 0;
}

int pv__io_pread(int fd, void *buf, size_t len, uint64_t offset, size_t *got, pv_errinfo *err) {
    *got = 0;
    if (!span_ok(offset, len)) {
        return pv__fail(err, PV_EINVAL, offset, len, 0, 0);
    }
    uint8_t *p = buf;
    size_t done = 0;
    while (done < len) {
        size_t n = len - done < IO_CHUNK ? len - done : IO_CHUNK;
        ssize_t rc;
        RETRY(rc, HOOK(&n, .op = PV__IO_PREAD, .fd = fd, .offset = offset + done),
              pread(fd, p + done, n, (off_t)(offset + done)));
        if (rc < 0) {
            *got = done;
            return pv__fail_sys(err, errno, offset, len, done);
        }
        if (rc == 0) {
            break;
        }
        done += (size_t)rc;
    }
    *got = done;
    return 0;
}

int pv__io_pread_full(int fd, void *buf, size_t len, uint64_t offset, pv_errinfo *err) {
    size_t got;
    int rc = pv__io_pread(fd, buf, len, offset, &got, err);
    if (rc < 0) {
        return rc;
    }
    return got == len ? 0 : pv__fail(err, PV_EEOF, offset, len, got, 0);
}

int pv__io_pread_cached(int fd, void *buf, size_t len, uint64_t offset, pv_errinfo *err) {
    if (!span_ok(offset, len)) {
        return pv__fail(err, PV_EINVAL, offset, len, 0, 0);
    }
    uint8_t *p = buf;
    size_t done = 0;
    while (done < len) {
        size_t n = len - done < IO_CHUNK ? len - done : IO_CHUNK;
        ssize_t rc;
        RETRY(rc, HOOK(&n, .op = PV__IO_PREAD, .fd = fd, .offset = offset + done),
              preadv2(fd, &(struct iovec){p + done, n}, 1, (off_t)(offset + done), RWF_NOWAIT));
        if (rc < 0) {
            return pv__fail_sys(err, errno, offset, len, done);
        }
        if (rc == 0) {
            return pv__fail(err, PV_EEOF, offset, len, done, 0);
        }
        done += (size_t)rc;
    }
    return 0;
}

int pv__io_pwrite(int fd, const void *buf, size_t len, uint64_t offset, pv_errinfo *err) {
    const struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
    return pv__io_pwritev(fd, &iov, 1, offset, err);
}

/* Copies the part of iov that begins skip bytes in and holds at most max bytes. Returns the number of pieces. */
static int iov_window(struct iovec *out, const struct iovec *iov, int count, size_t skip, size_t max) {
    int n = 0;
    for (int i = 0; i < count && max > 0; i++) {
        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        size_t len = iov[i].iov_len - skip;
        if (len > max) {
            len = max;
        }
        out[n].iov_base = (uint8_t *)iov[i].iov_base + skip;
        out[n].iov_len = len;
        n++;
        skip = 0;
        max -= len;
    }
    return n;
}

/* Writes pieces once, as far as the kernel takes them. */
static ssize_t write_once(int fd, struct iovec *part, int parts, size_t len, uint64_t offset) {
    ssize_t rc;
    size_t n = len;
    RETRY(rc, HOOK(&n, .op = PV__IO_PWRITE, .fd = fd, .offset = offset, .iov = part, .iov_count = parts),
          pwritev(fd, part, n == len ? parts : iov_window(part, part, parts, 0, n), (off_t)offset));
    return rc;
}

int pv__io_pwritev(int fd, const struct iovec *iov, int iov_count, uint64_t offset, pv_errinfo *err) {
    size_t total = 0;
    if (iov_count < 0 || iov_count > PV__IOV_MAX) {
        return pv__fail(err, PV_EINVAL, offset, 0, 0, 0);
    }
    for (int i = 0; i < iov_count; i++) {
        if (__builtin_add_overflow(total, iov[i].iov_len, &total)) {
            return pv__fail(err, PV_EINVAL, offset, SIZE_MAX, 0, 0);
        }
    }
    if (!span_ok(offset, total)) {
        return pv__fail(err, PV_EINVAL, offset, total, 0, 0);
    }
    size_t done = 0;
    while (done < total) {
        struct iovec part[PV__IOV_MAX];
        size_t n = total - done < IO_CHUNK ? total - done : IO_CHUNK;
        int parts = iov_window(part, iov, iov_count, done, n);
        ssize_t rc = write_once(fd, part, parts, n, offset + done);
        if (rc <= 0) {
            /* Nothing written and no errno does not happen on a file; calling again could go on for ever. */
            return pv__fail_sys(err, rc < 0 ? errno : EIO, offset, total, done);
        }
        done += (size_t)rc;
    }
    return 0;
}

#define DIRECT_ALIGN ((size_t)4096)

/* Reads what the page cache holds of a stretch, up to the first byte that it does not. 1: the file ends there. */
static int read_cached_part(int fd, uint8_t *p, size_t len, uint64_t offset, size_t *done) {
    while (*done < len) {
        size_t n = len - *done < IO_CHUNK ? len - *done : IO_CHUNK;
        ssize_t rc;
        RETRY(rc, HOOK(&n, .op = PV__IO_PREAD, .fd = fd, .offset = offset + *done),
              preadv2(fd, &(struct iovec){p + *done, n}, 1, (off_t)(offset + *done), RWF_NOWAIT));
        if (rc <= 0) {
            return rc == 0; /* a true error comes again from the read that follows */
        }
        *done += (size_t)rc;
    }
    return 0;
}

/* Reads the rest of a stretch by O_DIRECT as far as that goes. 1: the file ends there. */
static int read_direct_part(int fd, uint8_t *p, size_t len, uint64_t offset, size_t *done) {
    *done -= *done % DIRECT_ALIGN;
    while (*done < len) {
        size_t n = (len - *done + DIRECT_ALIGN - 1) / DIRECT_ALIGN * DIRECT_ALIGN;
        n = n < IO_CHUNK ? n : IO_CHUNK;
        ssize_t rc;
        RETRY(rc, HOOK(&n, .op = PV__IO_PREAD, .fd = fd, .offset = offset + *done),
              pread(fd, p + *done, n, (off_t)(offset + *done)));
        if (rc < 0) {
            return 0;
        }
        *done += (size_t)rc;
        if ((size_t)rc % DIRECT_ALIGN != 0 || rc == 0) {
            break;
        }
    }
    if (*done >= len) {
        *done = len;
        return 0;
    }
    return 1;
}

int pv__io_pread_aside(int fd, int direct_fd, void *buf, size_t len, uint64_t offset, size_t *got, pv_errinfo *err) {
    *got = 0;
    if (!span_ok(offset, len)) {
        return pv__fail(err, PV_EINVAL, offset, len, 0, 0);
    }
    size_t done = 0;
    int ends = read_cached_part(fd, buf, len, offset, &done);
    if (!ends && done < len && direct_fd >= 0 && offset % DIRECT_ALIGN == 0) {
        ends = read_direct_part(direct_fd, buf, len, offset, &done);
    }
    if (ends || done == len) {
        *got = done;
        return 0;
    }
    size_t rest = 0;
    int rc = pv__io_pread(fd, (uint8_t *)buf + done, len - done, offset + done, &rest, err);
    *got = done + rest;
    (void)posix_fadvise(fd, (off_t)(offset + done), (off_t)rest, POSIX_FADV_DONTNEED);
    return rc;
}

int pv__io_pwrite_aside(int fd, int direct_fd, const void *buf, size_t len, uint64_t offset, pv_errinfo *err) {
    if (!span_ok(offset, len)) {
        return pv__fail(err, PV_EINVAL, offset, len, 0, 0);
    }
    const uint8_t *p = buf;
    size_t done = 0;
    while (direct_fd >= 0 && len - done >= DIRECT_ALIGN && (offset + done) % DIRECT_ALIGN == 0 &&
           done % DIRECT_ALIGN == 0) {
        size_t n = (len - done) / DIRECT_ALIGN * DIRECT_ALIGN;
        struct iovec part = {.iov_base = (void *)(uintptr_t)(p + done), .iov_len = n < IO_CHUNK ? n : IO_CHUNK};
        ssize_t rc = write_once(direct_fd, &part, 1, part.iov_len, offset + done);
        if (rc < 0 && errno != EINVAL) {
            return pv__fail_sys(err, errno, offset, len, done);
        }
        if (rc <= 0) {
            break; /* a file system that wants another alignment */
        }
        done += (size_t)rc;
    }
    if (done == len) {
        return 0;
    }
    int rc = pv__io_pwrite(fd, p + done, len - done, offset + done, err);
    if (rc == 0) {
        pv__io_begin_writing(fd, offset + done, len - done);
    }
    return rc;
}

void pv__io_begin_writing(int fd, uint64_t offset, uint64_t len) {
    (void)sync_file_range(fd, (off_t)offset, (off_t)len, SYNC_FILE_RANGE_WRITE);
}

int pv__io_datasync(int fd, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_DATASYNC, .fd = fd), fdatasync(fd));
    return rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
}

int pv__io_sync(int fd, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_SYNC, .fd = fd), fsync(fd));
    return rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
}

int pv__io_truncate(int fd, uint64_t size, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    if (size > PV__OFF_MAX) {
        return pv__fail(err, PV_EINVAL, size, 0, 0, 0);
    }
    RETRY(rc, HOOK(&len, .op = PV__IO_TRUNCATE, .fd = fd, .offset = size), ftruncate(fd, (off_t)size));
    return rc < 0 ? pv__fail_sys(err, errno, size, 0, 0) : 0;
}

int pv__io_allocate(int fd, uint64_t len, pv_errinfo *err) {
    int rc;
    size_t ignored = 0;
    if (len > PV__OFF_MAX) {
        return pv__fail(err, PV_EINVAL, 0, len, 0, 0);
    }
    if (len == 0) {
        return 0;
    }
    RETRY(rc, HOOK(&ignored, .op = PV__IO_ALLOCATE, .fd = fd, .offset = len),
          fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, (off_t)len));
    if (rc < 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
        return pv__fail_sys(err, errno, 0, len, 0);
    }
    return 0;
}

int pv__io_stat(int fd, struct stat *st, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_STAT, .fd = fd), fstat(fd, st));
    return rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
}

int pv__io_size(int fd, uint64_t *size, pv_errinfo *err) {
    struct stat st;
    int rc = pv__io_stat(fd, &st, err);
    *size = rc == 0 && st.st_size > 0 ? (uint64_t)st.st_size : 0;
    return rc;
}

int pv__io_rename(const char *from, const char *to, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_RENAME, .fd = -1, .path = from, .path2 = to), rename(from, to));
    return rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
}

int pv__io_unlink(const char *path, pv_errinfo *err) {
    int rc;
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_UNLINK, .fd = -1, .path = path), unlink(path));
    return rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
}

int pv__io_sync_dir(const char *path, pv_errinfo *err) {
    int fd;
    int rc = pv__io_open(path, O_RDONLY | O_DIRECTORY, 0, &fd, err);
    if (rc < 0) {
        return rc;
    }
    size_t len = 0;
    RETRY(rc, HOOK(&len, .op = PV__IO_SYNC_DIR, .fd = fd, .path = path), fsync(fd));
    rc = rc < 0 ? pv__fail_sys(err, errno, 0, 0, 0) : 0;
    int rc_close = pv__io_close(fd, rc < 0 ? NULL : err);
    return rc < 0 ? rc : rc_close;
}
