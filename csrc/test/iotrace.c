/* iotrace.c - a library to preload into an untouched build: logs what a process does to the files below one directory,
 * and makes a chosen call fail.
 *
 * Environment, read once: IOTRACE_DIR, an absolute path; nothing else is looked at. IOTRACE_LOG, the file the log goes
 * to (none: no log). IOTRACE_FULL, a path: while something is there, the disk is full.
 * IOTRACE_FLUSH_US: how long each flush takes, so that others come in meanwhile.
 *
 * The log is a row of entries: a header of 48 bytes (struct entry, native byte order) and its bytes: what was written,
 * a path, two paths with a NUL between them, or a note of the program. An entry stands where its call took effect: one
 * lock is held over each changing call and its entry. Flushes are not under the lock: they have an entry where they
 * begin and one where they end. A call that failed has none. Files are named by inode; an inode is new with each entry
 * CREATE.
 *
 * iotrace_arm(n, errno) makes the nth call from now fail once without being made; a write of more than one byte first
 * writes half of it. Close is not counted: it cannot be refused.
 */
#define _GNU_SOURCE 1
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define FDS 4096
#define PATH_ROOM 4096

enum op { OP_CREATE = 1, OP_WRITE, OP_TRUNCATE, OP_SYNC_BEGIN, OP_SYNC_END, OP_RENAME, OP_UNLINK, OP_NOTE };

typedef struct entry {
    uint32_t op;
    uint32_t thread;
    uint64_t inode;
    uint64_t offset; /* of a write; the new size of a truncate */
    uint64_t len;    /* of the bytes behind the entry */
    uint64_t token;  /* the same in SYNC_BEGIN and its SYNC_END */
    uint64_t reserved;
} entry;
_Static_assert(sizeof(entry) == 48, "the reader of the log knows this size");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char dir[PATH_ROOM];
static size_t dir_len;
static const char *full_path;
static useconds_t flush_us;
static int log_fd = -1;
static uint64_t inodes[FDS]; /* of watched descriptors, else 0 */
static uint64_t next_token;
static long countdown;
static int fail_errno;
static long calls;

static int (*real_open)(const char *, int, ...);
static int (*real_close)(int);
static ssize_t (*real_pread)(int, void *, size_t, off_t);
static ssize_t (*real_read)(int, void *, size_t);
static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwritev)(int, const struct iovec *, int, off_t);
static int (*real_ftruncate)(int, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_rename)(const char *, const char *);
static int (*real_unlink)(const char *);

static void init(void) {
#define FIND(name) (*(void **)&real_##name = dlsym(RTLD_NEXT, #name))
    FIND(open);
    FIND(close);
    FIND(pread);
    FIND(read);
    FIND(write);
    FIND(pwritev);
    FIND(ftruncate);
    FIND(fsync);
    FIND(fdatasync);
    FIND(rename);
    FIND(unlink);
    const char *d = getenv("IOTRACE_DIR");
    if (d != NULL && d[0] == '/' && strlen(d) < sizeof dir - 1) {
        dir_len = strlen(d);
        memcpy(dir, d, dir_len + 1);
    }
    full_path = getenv("IOTRACE_FULL");
    const char *us = getenv("IOTRACE_FLUSH_US");
    flush_us = us != NULL ? (useconds_t)(strtoul(us, NULL, 10) % 1000000U) : 0;
    const char *l = getenv("IOTRACE_LOG");
    if (l != NULL) {
        log_fd = real_open(l, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
        if (log_fd < 0) {
            abort();
        }
    }
}

static void setup(void) {
    if (pthread_once(&once, init) != 0) {
        abort();
    }
}

static bool watched_path(const char *path) {
    return dir_len > 0 && strncmp(path, dir, dir_len) == 0 && (path[dir_len] == '/' || path[dir_len] == 0);
}

static uint64_t watched_fd(int fd) {
    return fd >= 0 && fd < FDS ? __atomic_load_n(&inodes[fd], __ATOMIC_SEQ_CST) : 0;
}

/* lock held. One write, so that a killed process leaves whole entries or a torn last one. */
static void put(enum op op, uint64_t inode, uint64_t offset, uint64_t token, const struct iovec *iov, int count,
                size_t len) {
    if (log_fd < 0) {
        return;
    }
    entry e = {.op = (uint32_t)op, .inode = inode, .offset = offset, .len = len, .token = token};
    e.thread = (uint32_t)syscall(SYS_gettid);
    uint8_t *buf = malloc(sizeof e + len);
    if (buf == NULL) {
        abort();
    }
    memcpy(buf, &e, sizeof e);
    size_t at = sizeof e;
    for (int i = 0; i < count && at < sizeof e + len; i++) {
        size_t n = iov[i].iov_len < sizeof e + len - at ? iov[i].iov_len : sizeof e + len - at;
        if (n > 0) {
            memcpy(buf + at, iov[i].iov_base, n);
            at += n;
        }
    }
    for (size_t done = 0; done < at;) {
        ssize_t rc = syscall(SYS_write, log_fd, buf + done, at - done);
        if (rc <= 0) {
            abort();
        }
        done += (size_t)rc;
    }
    free(buf);
}

static void put_text(enum op op, uint64_t inode, const char *text, size_t len) {
    const struct iovec iov = {.iov_base = (void *)(uintptr_t)text, .iov_len = len};
    put(op, inode, 0, 0, &iov, 1, len);
}

/* Whether this call is the one to fail; sets errno. */
static bool fails(void) {
    pthread_mutex_lock(&lock);
    calls++;
    bool hit = countdown > 0 && --countdown == 0;
    pthread_mutex_unlock(&lock);
    if (hit) {
        errno = fail_errno;
    }
    return hit;
}

/* ------------------------------------------------------------------ for the program under test, by dlsym */

EXPORT void iotrace_note(const char *text) {
    setup();
    pthread_mutex_lock(&lock);
    put_text(OP_NOTE, 0, text, strlen(text));
    pthread_mutex_unlock(&lock);
}

EXPORT void iotrace_arm(long nth, int err) {
    setup();
    pthread_mutex_lock(&lock);
    countdown = nth;
    fail_errno = err;
    calls = 0;
    pthread_mutex_unlock(&lock);
}

/* Calls since iotrace_arm. */
EXPORT long iotrace_calls(void) {
    pthread_mutex_lock(&lock);
    long n = calls;
    pthread_mutex_unlock(&lock);
    return n;
}

/* ------------------------------------------------------------------ the calls */

static int do_open(const char *path, int flags, mode_t mode) {
    setup();
    if (!watched_path(path)) {
        return real_open(path, flags, mode);
    }
    if (fails()) {
        return -1;
    }
    pthread_mutex_lock(&lock);
    struct stat st;
    bool existed = stat(path, &st) == 0;
    off_t old_size = existed ? st.st_size : 0;
    int fd = real_open(path, flags, mode);
    int saved = errno;
    if (fd >= 0 && fd < FDS && fstat(fd, &st) == 0) {
        __atomic_store_n(&inodes[fd], (uint64_t)st.st_ino, __ATOMIC_SEQ_CST);
        if (!existed) {
            put_text(OP_CREATE, st.st_ino, path, strlen(path));
        } else if ((flags & O_TRUNC) && old_size > 0) {
            put(OP_TRUNCATE, st.st_ino, 0, 0, NULL, 0, 0);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return fd;
}

EXPORT int open(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list ap;
        va_start(ap, flags);
        mode = (mode_t)va_arg(ap, unsigned);
        va_end(ap);
    }
    return do_open(path, flags, mode);
}

EXPORT int open64(const char *path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list ap;
        va_start(ap, flags);
        mode = (mode_t)va_arg(ap, unsigned);
        va_end(ap);
    }
    return do_open(path, flags, mode);
}

EXPORT int close(int fd) {
    setup();
    if (fd >= 0 && fd < FDS) {
        __atomic_store_n(&inodes[fd], 0, __ATOMIC_SEQ_CST);
    }
    return real_close(fd);
}

EXPORT ssize_t pread(int fd, void *buf, size_t len, off_t offset) {
    setup();
    return watched_fd(fd) != 0 && fails() ? -1 : real_pread(fd, buf, len, offset);
}

EXPORT ssize_t pread64(int fd, void *buf, size_t len, off_t offset) {
    return pread(fd, buf, len, offset);
}

EXPORT ssize_t read(int fd, void *buf, size_t len) {
    setup();
    return watched_fd(fd) != 0 && fails() ? -1 : real_read(fd, buf, len);
}

/* Writes pieces at an offset, or at the descriptor's position (offset -1), and logs what was written. */
static ssize_t do_write(int fd, const struct iovec *iov, int count, off_t offset) {
    uint64_t inode = watched_fd(fd);
    bool fail = fails();
    int fail_with = errno;
    if (!fail && full_path != NULL && access(full_path, F_OK) == 0) {
        fail = true;
        fail_with = ENOSPC;
    }
    struct iovec half = iov[0];
    if (fail) {
        half.iov_len /= 2;
        iov = &half;
        count = 1;
        if (half.iov_len == 0) {
            return -1;
        }
    }
    pthread_mutex_lock(&lock);
    ssize_t rc;
    if (offset >= 0) {
        rc = real_pwritev(fd, iov, count, offset);
    } else {
        offset = lseek(fd, 0, SEEK_CUR);
        rc = real_write(fd, iov[0].iov_base, iov[0].iov_len);
    }
    int saved = errno;
    if (rc > 0) {
        put(OP_WRITE, inode, (uint64_t)offset, 0, iov, count, (size_t)rc);
    }
    pthread_mutex_unlock(&lock);
    errno = fail ? fail_with : saved;
    return fail ? -1 : rc;
}

EXPORT ssize_t write(int fd, const void *buf, size_t len) {
    setup();
    if (watched_fd(fd) == 0 || len == 0) {
        return real_write(fd, buf, len);
    }
    const struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
    return do_write(fd, &iov, 1, -1);
}

EXPORT ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset) {
    setup();
    return watched_fd(fd) == 0 || count < 1 ? real_pwritev(fd, iov, count, offset) : do_write(fd, iov, count, offset);
}

EXPORT ssize_t pwritev64(int fd, const struct iovec *iov, int count, off_t offset) {
    return pwritev(fd, iov, count, offset);
}

EXPORT ssize_t pwrite(int fd, const void *buf, size_t len, off_t offset) {
    const struct iovec iov = {.iov_base = (void *)(uintptr_t)buf, .iov_len = len};
    return pwritev(fd, &iov, 1, offset);
}

EXPORT ssize_t pwrite64(int fd, const void *buf, size_t len, off_t offset) {
    return pwrite(fd, buf, len, offset);
}

EXPORT int ftruncate(int fd, off_t size) {
    setup();
    uint64_t inode = watched_fd(fd);
    if (inode == 0) {
        return real_ftruncate(fd, size);
    }
    if (fails()) {
        return -1;
    }
    pthread_mutex_lock(&lock);
    int rc = real_ftruncate(fd, size);
    int saved = errno;
    if (rc == 0) {
        put(OP_TRUNCATE, inode, (uint64_t)size, 0, NULL, 0, 0);
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return rc;
}

EXPORT int ftruncate64(int fd, off_t size) {
    return ftruncate(fd, size);
}

static int do_sync(int fd, int (*call)(int)) {
    uint64_t inode = watched_fd(fd);
    if (inode == 0) {
        return call(fd);
    }
    pthread_mutex_lock(&lock);
    uint64_t token = ++next_token;
    put(OP_SYNC_BEGIN, inode, 0, token, NULL, 0, 0);
    pthread_mutex_unlock(&lock);
    if (fails()) {
        return -1;
    }
    if (flush_us > 0) {
        (void)usleep(flush_us);
    }
    int rc = call(fd);
    int saved = errno;
    if (rc == 0) {
        pthread_mutex_lock(&lock);
        put(OP_SYNC_END, inode, 0, token, NULL, 0, 0);
        pthread_mutex_unlock(&lock);
    }
    errno = saved;
    return rc;
}

EXPORT int fsync(int fd) {
    setup();
    return do_sync(fd, real_fsync);
}

EXPORT int fdatasync(int fd) {
    setup();
    return do_sync(fd, real_fdatasync);
}

EXPORT int rename(const char *from, const char *to) {
    setup();
    if (!watched_path(from) && !watched_path(to)) {
        return real_rename(from, to);
    }
    if (fails()) {
        return -1;
    }
    char both[2 * PATH_ROOM];
    size_t from_len = strlen(from);
    size_t to_len = strlen(to);
    if (from_len >= PATH_ROOM || to_len >= PATH_ROOM) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(both, from, from_len + 1);
    memcpy(both + from_len + 1, to, to_len);
    pthread_mutex_lock(&lock);
    int rc = real_rename(from, to);
    int saved = errno;
    if (rc == 0) {
        put_text(OP_RENAME, 0, both, from_len + 1 + to_len);
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return rc;
}

EXPORT int unlink(const char *path) {
    setup();
    if (!watched_path(path)) {
        return real_unlink(path);
    }
    if (fails()) {
        return -1;
    }
    pthread_mutex_lock(&lock);
    int rc = real_unlink(path);
    int saved = errno;
    if (rc == 0) {
        put_text(OP_UNLINK, 0, path, strlen(path));
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
    return rc;
}
