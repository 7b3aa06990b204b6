/* bench_map.c - memory and time of the needle map. Not a test.
 *
 *     bench_map [needles] [order] [width]      10000000, all of: rising gaps jitter shuffled shuffled-gaps sparse, 4
 *
 * Each order runs in a process of its own: an index file is written, loaded, then looked up, overwritten and deleted at
 * random. "peak" is what the process's resident memory grew by at its highest until the load was done, per needle,
 * the file cache not counted; "map" is what the map says of itself.
 */
#include "t.h"

#include <sys/wait.h>
#include <time.h>

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* A field of /proc/self/status in bytes. */
static uint64_t status_bytes(const char *field) {
    FILE *f = fopen("/proc/self/status", "r");
    CHECK(f != NULL);
    char line[256];
    unsigned long kb = 0;
    while (fgets(line, sizeof line, f) != NULL) {
        if (strncmp(line, field, strlen(field)) == 0) {
            CHECK(sscanf(line + strlen(field), ": %lu", &kb) == 1);
        }
    }
    fclose(f);
    return (uint64_t)kb * 1024;
}

static void reset_peak(void) {
    int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    CHECK(write(fd, "5", 1) == 1);
    close(fd);
}

/* A permutation of [0, n) for n a power of two or less: walked by an odd multiplier and folded, without memory. */
static uint64_t permute(uint64_t i, unsigned bits) {
    const uint64_t mask = bits == 64 ? UINT64_MAX : ((uint64_t)1 << bits) - 1;
    const unsigned shift = bits / 2 + 1;
    for (int round = 0; round < 3; round++) {
        i = (i * 0x9e3779b97f4a7c15U) & mask;
        i ^= i >> shift;
    }
    return i;
}

typedef struct order {
    const char *name;
    uint64_t n;
    unsigned bits;
} order;

/* The i-th key written, i.e. in the order of offsets. */
static uint64_t key_of(const order *o, uint64_t i) {
    uint64_t state = i;
    if (strcmp(o->name, "rising") == 0) {
        return 1 + i;
    }
    if (strcmp(o->name, "gaps") == 0) { /* one volume of about 50 that share a sequence */
        return 1 + i * 50 + t_rand_below(&state, 50);
    }
    if (strcmp(o->name, "jitter") == 0) { /* blocks of 32 keys arrive out of order */
        return 1 + (i & ~(uint64_t)31) + permute(i & 31, 5);
    }
    if (strcmp(o->name, "sparse") == 0) {
        return t_rand(&state);
    }
    uint64_t p = permute(i, o->bits);
    while (p >= o->n) {
        p = permute(p, o->bits);
    }
    return strcmp(o->name, "shuffled-gaps") == 0 ? 1 + p * 50 : 1 + p;
}

static int write_index(const order *o, uint8_t width) {
    int fd = t_file();
    const size_t row_len = 12U + width;
    static uint8_t buf[17 * 8192];
    size_t used = 0;
    uint64_t at = 0;
    uint64_t offset = 8;
    uint64_t state = 7;
    for (uint64_t i = 0; i < o->n; i++) {
        pv_idx_row row = {.key = key_of(o, i), .offset = offset, .size = (int32_t)(30 + t_rand_below(&state, 6000))};
        offset += (uint64_t)pv_needle_record_len(row.size, 3);
        pv_idx_row_put(&row, width, buf + used);
        used += row_len;
        if (used + row_len > sizeof buf || i + 1 == o->n) {
            CHECK_EQ(pv__io_pwrite(fd, buf, used, at, NULL), 0);
            at += used;
            used = 0;
        }
    }
    CHECK(width == 5 || offset <= (uint64_t)1 << 35);
    return fd;
}

static void run(const order *o, uint8_t width) {
    int fd = write_index(o, width);
    pv_map *m;
    CHECK_EQ(pv_map_new(width, &m), 0);
    reset_peak();
    const uint64_t rss = status_bytes("VmRSS");
    double t = now_s();
    uint64_t rows;
    CHECK_EQ(pv_map_load(m, fd, 0, &rows, NULL), 0);
    const double load_s = now_s() - t;
    const uint64_t peak = status_bytes("VmHWM") - rss;
    CHECK_EQ(rows, o->n);
    close(fd);
    pv_map_stats st;
    pv_map_stat(m, &st);
    const double n = (double)st.entries;

    const uint64_t ops = 2000000;
    uint64_t state = 99;
    uint64_t offset;
    int32_t size;
    t = now_s();
    for (uint64_t i = 0; i < ops; i++) {
        CHECK_EQ(pv_map_get(m, key_of(o, t_rand_below(&state, o->n)), &offset, &size), 0);
    }
    const double get_ns = (now_s() - t) / (double)ops * 1e9;
    t = now_s();
    for (uint64_t i = 0; i < ops; i++) {
        uint64_t key = key_of(o, t_rand_below(&state, o->n));
        CHECK_EQ(pv_map_put(m, key, t_rand_below(&state, (uint64_t)1 << 32) * 8, 4000, &offset, &size), 0);
    }
    const double put_ns = (now_s() - t) / (double)ops * 1e9;
    t = now_s();
    for (uint64_t i = 0; i < ops; i++) {
        CHECK_EQ(pv_map_delete(m, key_of(o, t_rand_below(&state, o->n)), &size), 0);
    }
    const double del_ns = (now_s() - t) / (double)ops * 1e9;
    pv_map_stats after;
    pv_map_stat(m, &after);
    printf("%-14s %5u %9" PRIu64 " %9.2f %9.2f %8.2f %7.0f %7.0f %7.0f %7.0f %12.2f\n", o->name, width, st.entries,
           (double)peak / n, (double)st.memory_bytes / n, load_s, load_s / (double)o->n * 1e9, get_ns, put_ns, del_ns,
           (double)after.memory_bytes / n);
    fflush(stdout);
    pv_map_free(m);
}

int main(int argc, char **argv) {
    static const char *const names[] = {"rising", "gaps", "jitter", "shuffled", "shuffled-gaps", "sparse"};
    const uint64_t n = argc > 1 ? strtoull(argv[1], NULL, 10) : 10000000;
    const char *only = argc > 2 ? argv[2] : "all";
    const uint8_t width = argc > 3 && strcmp(argv[3], "5") == 0 ? 5 : 4;
    CHECK(n > 0);
    printf("%-14s %5s %9s %9s %9s %8s %7s %7s %7s %7s %12s\n", "order", "width", "needles", "peak B/n", "map B/n",
           "load s", "ns/row", "get ns", "put ns", "del ns", "B/n after");
    fflush(stdout);
    for (size_t i = 0; i < PV__ARRAY_LEN(names); i++) {
        order o = {.name = names[i], .n = n, .bits = 1};
        if (strcmp(only, "all") != 0 && strcmp(only, o.name) != 0) {
            continue;
        }
        while (((uint64_t)1 << o.bits) < n) {
            o.bits++;
        }
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) {
            run(&o, width);
            exit(0);
        }
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(status == 0);
    }
    return 0;
}
