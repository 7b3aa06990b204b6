/* Threads against a lane: clients that write, read, delete and send requests that are handed over, a taker that answers
 * those by closing or by giving the connection back, and a volume that is withdrawn, made read-only, published and closed
 * under all of them, shards that come and go; in the end a stop in the midst of it. Meant for ThreadSanitizer;
 * STRESS_S=seconds (default 2). */
#include "t_shards.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <time.h>

#define CLIENTS 6
#define KEYS 24U
#define LEN_MAX 70000U

typedef struct shared {
    pv_reg *reg;
    pv_mime *mime;
    pv_lane *lane;
    char dir[64];
    uint16_t port;
    _Atomic bool stop;
    _Atomic uint64_t served;
    _Atomic uint64_t taken;
} shared;

typedef struct client {
    pthread_t thread;
    shared *s;
    uint64_t seed;
    unsigned number;
    char body[LEN_MAX + 4096];
} client;

static int dial(const shared *s) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in in = {
        .sin_family = AF_INET, .sin_port = htons(s->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {20, 0};
    CHECK(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0);
    if (connect(fd, (struct sockaddr *)&in, sizeof in) < 0) {
        CHECK(close(fd) == 0);
        return -1;
    }
    return fd;
}

static bool say(int fd, const char *p, size_t n) {
    while (n > 0) {
        ssize_t rc = send(fd, p, n, MSG_NOSIGNAL);
        if (rc <= 0) {
            return false;
        }
        p += rc;
        n -= (size_t)rc;
    }
    return true;
}

/* The status and the body of one answer; 0 when the connection was closed instead. */
static int hear(int fd, char *to, size_t cap, size_t *n) {
    size_t len = 0;
    while (len < 4 || memcmp(to + len - 4, "\r\n\r\n", 4) != 0) {
        ssize_t rc = recv(fd, to + len, 1, 0);
        if (rc <= 0) {
            CHECK(rc == 0 || errno == ECONNRESET); /* not: nothing came for 20 s */
            return 0;
        }
        len++;
    }
    to[len] = 0;
    int status = atoi(to + 9);
    const char *told = strstr(to, "\r\nContent-Length: ");
    *n = told != NULL ? (size_t)atol(told + 18) : 0;
    CHECK(*n <= cap);
    for (size_t got = 0; got < *n;) {
        ssize_t rc = recv(fd, to + got, *n - got, 0);
        if (rc <= 0) {
            CHECK(rc == 0 || errno == ECONNRESET);
            return 0;
        }
        got += (size_t)rc;
    }
    return status;
}

static void *client_main(void *arg) {
    client *c = arg;
    shared *s = c->s;
    int fd = -1;
    char *text = malloc(LEN_MAX + 512);
    CHECK(text != NULL);
    while (!atomic_load(&s->stop)) {
        if (fd < 0 && (fd = dial(s)) < 0) {
            continue;
        }
        uint64_t key = 1 + t_rand_below(&c->seed, KEYS);
        uint64_t kind = t_rand_below(&c->seed, 10);
        size_t len = 0, at = 0;
        if (kind < 3) {
            len = 1 + t_rand_below(&c->seed, t_rand_below(&c->seed, 8) == 0 ? LEN_MAX : 300);
            at = (size_t)snprintf(text, 512,
                                  "POST /3,%" PRIx64 "deadbeef%s HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\n"
                                  "Content-Length: %zu\r\n\r\n",
                                  key, t_rand_below(&c->seed, 4) == 0 ? "?fsync=true" : "", len);
            memset(text + at, (int)key, len);
        } else if (kind < 5) {
            at =
                (size_t)snprintf(text, 512, "GET /4,%" PRIx64 "%08x HTTP/1.1\r\nHost: h\r\n\r\n", key, T_SHARDS_COOKIE);
        } else if (kind < 7) {
            at = (size_t)snprintf(text, 512, "GET /3,%" PRIx64 "deadbeef HTTP/1.1\r\nHost: h\r\n\r\n", key);
        } else if (kind < 8) {
            at = (size_t)snprintf(text, 512, "DELETE /3,%" PRIx64 "deadbeef HTTP/1.1\r\nHost: h\r\n\r\n", key);
        } else if (kind < 9) {
            at = (size_t)snprintf(text, 512, "OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n");
        } else { /* gone in the midst of it */
            (void)say(fd, "GET /3,01de", t_rand_below(&c->seed, 12));
            CHECK(close(fd) == 0);
            fd = -1;
            continue;
        }
        size_t n = 0;
        int status = 0;
        size_t cut = t_rand_below(&c->seed, 3) == 0 ? t_rand_below(&c->seed, at + len) : 0;
        if (say(fd, text, cut) && say(fd, text + cut, at + len - cut)) {
            status = hear(fd, c->body, LEN_MAX, &n);
        }
        if (status == 0) {
            CHECK(close(fd) == 0);
            fd = -1;
            continue;
        }
        CHECK(status == 200 || status == 201 || status == 202 || status == 204 || status == 299 || status == 503);
        if (kind >= 3 && kind < 7 && status == 200) {
            CHECK(n > 0);
            for (size_t i = 0; i < n; i++) {
                CHECK_EQ((uint8_t)c->body[i], key);
            }
        }
        atomic_fetch_add(&s->served, 1);
    }
    if (fd >= 0) {
        CHECK(close(fd) == 0);
    }
    free(text);
    return NULL;
}

static void *taker_main(void *arg) {
    shared *s = arg;
    static const char reply[] = "HTTP/1.1 299 Taken\r\nContent-Length: 0\r\n\r\n";
    uint64_t seed = 7;
    for (;;) {
        pv_lane_item items[8];
        struct pollfd mail = {pv_lane_mail_fd(s->lane), POLLIN, 0};
        (void)poll(&mail, 1, 50);
        int n = pv_lane_take(s->lane, items, 8);
        if (n < 0) {
            return NULL;
        }
        for (int i = 0; i < n; i++) {
            CHECK(items[i].size > 0);
            atomic_fetch_add(&s->taken, 1);
            /* Only a request that is here as a whole may be answered. */
            bool whole = memmem(items[i].data, items[i].size, "\r\n\r\n", 4) != NULL && items[i].data[0] != 'P';
            if (!whole || t_rand_below(&seed, 4) == 0 || !say(items[i].fd, reply, sizeof reply - 1) ||
                pv_lane_give(s->lane, items[i].fd, items[i].flags) < 0) {
                CHECK(close(items[i].fd) == 0);
            }
            pv_lane_item_free(s->lane, &items[i]);
        }
    }
}

static pv_vol *open_volume(const shared *s, uint32_t flags) {
    char dat[96], idx[96];
    snprintf(dat, sizeof dat, "%s/3.dat", s->dir);
    snprintf(idx, sizeof idx, "%s/3.idx", s->dir);
    pv_vol_opts o = {.dat_path = dat, .idx_path = idx, .vid = 3, .flags = flags, .offset_width = 4};
    o.superblock.version = 3;
    pv_vol *v;
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(&o, &v, &err), 0);
    return v;
}

int main(void) {
    const char *seconds = getenv("STRESS_S");
    static shared s = {.dir = "/tmp/pv-lane-XXXXXX"};
    CHECK(mkdtemp(s.dir) != NULL);
    pv_vol *v = open_volume(&s, PV_VOL_CREATE);
    CHECK_EQ(pv_reg_new(&s.reg), 0);
    CHECK_EQ(pv_reg_publish_as(s.reg, 3, v, PV_REG_SINGLE), 0);
    t_coded coded = t_coded_new();
    CHECK_EQ(pv_mime_new(&s.mime), 0);
    CHECK_EQ(pv_mime_seal(s.mime), 0);
    pv_lane_opts lo = {.registry = s.reg,
                       .mime = s.mime,
                       .server = "S",
                       .size_limit_bytes = 1 << 20,
                       .body_bytes = 1 << 20,
                       .budget_bytes = 400000,
                       .idle_timeout_ms = 5000,
                       .threads = 3,
                       .io_threads = 2,
                       .sync_threads = 2,
                       .max_connections = 100,
                       .mailbox = 64,
                       .serve = PV_LANE_READS | PV_LANE_WRITES};
    CHECK_EQ(pv_lane_new(&lo, &s.lane), 0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof in;
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&in, sizeof in) == 0 && listen(fd, 64) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&in, &len) == 0);
    s.port = ntohs(in.sin_port);
    CHECK_EQ(pv_lane_listen(s.lane, fd, 0), 0);
    CHECK_EQ(pv_lane_start(s.lane), 0);
    static client clients[CLIENTS];
    pthread_t taker;
    CHECK(pthread_create(&taker, NULL, taker_main, &s) == 0);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i].s = &s;
        clients[i].seed = i + 1;
        CHECK(pthread_create(&clients[i].thread, NULL, client_main, &clients[i]) == 0);
    }
    time_t until = time(NULL) + (seconds != NULL ? atoi(seconds) : 2);
    uint64_t seed = 99;
    while (time(NULL) < until) {
        struct timespec moment = {0, 5000000};
        (void)nanosleep(&moment, NULL);
        uint64_t what = t_rand_below(&seed, 5);
        if (what == 0) {
            CHECK_EQ(pv_vol_set_readonly(v, 1, 1), 0);
            (void)nanosleep(&moment, NULL);
            CHECK_EQ(pv_vol_set_readonly(v, 0, 0), 0);
        } else if (what == 1) {
            pv_lane_serve(s.lane, PV_LANE_READS);
            (void)nanosleep(&moment, NULL);
            pv_lane_serve(s.lane, PV_LANE_READS | PV_LANE_WRITES);
        } else if (what == 2) {
            CHECK_EQ(pv_reg_withdraw(s.reg, 3), 0);
            CHECK_EQ(pv_vol_close(v, NULL), 0);
            pv_vol_unref(v);
            v = open_volume(&s, 0);
            CHECK_EQ(pv_reg_publish_as(s.reg, 3, v, PV_REG_SINGLE), 0);
        } else if (what == 3) {
            int rc = pv_reg_withdraw(s.reg, 4);
            CHECK(rc == 0 || rc == PV_ENOTFOUND); /* it is published here for the first time */
            pv_shards *view = t_coded_view(&coded, ~(1U << t_rand_below(&seed, 10)));
            CHECK_EQ(pv_reg_publish_shards(s.reg, 4, view), 0);
            pv_shards_elsewhere(view, 0, t_rand_below(&seed, 2) == 0 ? 60000 : 0);
            pv_shards_unref(view);
            CHECK(pv_ids_add(coded.deleted, t_rand(&seed) | 1U << 20) >= 0);
        } else {
            pv_lane_stats stats;
            pv_lane_stat(s.lane, &stats);
        }
    }
    pv_lane_quiesce(s.lane);
    CHECK(pthread_join(taker, NULL) == 0);
    (void)pv_lane_stop(s.lane, 2000);
    atomic_store(&s.stop, true);
    for (unsigned i = 0; i < CLIENTS; i++) {
        CHECK(pthread_join(clients[i].thread, NULL) == 0);
    }
    pv_lane_stats stats;
    pv_lane_stat(s.lane, &stats);
    CHECK_EQ(stats.connections, 0);
    CHECK_EQ(stats.held_bytes, 0);
    CHECK(atomic_load(&s.served) > 0 && atomic_load(&s.taken) > 0 && stats.given > 0 && stats.io_jobs > 0);
    printf("  %" PRIu64 " answers, %" PRIu64 " handed over, %" PRIu64 " given back\n", atomic_load(&s.served),
           atomic_load(&s.taken), stats.given);
    pv_lane_free(s.lane);
    t_coded_free(&coded);
    pv_reg_free(s.reg);
    CHECK_EQ(pv_vol_close(v, NULL), 0);
    pv_vol_unref(v);
    pv_mime_free(s.mime);
    char path[96];
    snprintf(path, sizeof path, "%s/3.dat", s.dir);
    CHECK(unlink(path) == 0);
    snprintf(path, sizeof path, "%s/3.idx", s.dir);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(s.dir) == 0);
    return T_END();
}
