/* Tests of the fast lane: the recogniser of heads by itself, then a lane on the loopback with one volume. */
#include "../pv_lane_int.h"
#include "t.h"

#include <stdatomic.h>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#define PATH "/3,01deadbeef"
#define REQUEST "GET " PATH " HTTP/1.1\r\nHost: h:1\r\n"

/* ------------------------------------------------------------------ heads */

static const struct {
    const char *text;
    int rc; /* 1: recognised to the end, else the code */
} heads[] = {
    {REQUEST "\r\n", 1},
    {"HEAD " PATH "?readDeleted=true HTTP/1.1\r\nhost:h\r\n\r\n", 1},
    {"DELETE " PATH "?type=replicate HTTP/1.1\r\nHost: h\r\nConnection: Keep-Alive\r\n\r\n", 1},
    {"PUT " PATH "_1.jpg HTTP/1.1\r\nHost: h\r\nContent-Length: 12\r\nContent-Type: a/b; c=\"d\"\r\n\r\n", 1},
    {REQUEST "User-Agent:\t x \r\nAccept: */*\r\nconnection: close\r\nRange: bytes=0-1,4-\r\n\r\n", 1},
    {REQUEST "Connection: close", PV_EMORE},
    {REQUEST, PV_EMORE},
    {"G", PV_EMORE},
    {"", PV_EMORE},
    {"GET " PATH " HTTP/1.0\r\nHost: h\r\n\r\n", PV_EPARSE},
    {"GET " PATH " HTTP/1.1\nHost: h\r\n\r\n", PV_EPARSE},
    {"GET " PATH " HTTP/1.1\r\n\r\n", PV_EPARSE},
    {"GET /status HTTP/1.1\r\n", PV_EPARSE},
    {"GET / HTTP/1.1\r\n", PV_EPARSE},
    {"GET http://h" PATH " HTTP/1.1\r\n", PV_EPARSE},
    {"GET /3,01%20 HTTP/1.1\r\n", PV_EPARSE},
    {"GET " PATH "?a=%20 HTTP/1.1\r\n", PV_EPARSE},
    {"GET " PATH "#x HTTP/1.1\r\n", PV_EPARSE},
    {"GET  " PATH " HTTP/1.1\r\n", PV_EPARSE},
    {"OPTIONS " PATH " HTTP/1.1\r\n", PV_EPARSE},
    {"\r\n", PV_EPARSE},
    {"\x16\x03\x01", PV_EPARSE},
    {"get " PATH " HTTP/1.1\r\n", PV_EPARSE},
    {REQUEST "Host: h\r\n", PV_EPARSE},
    {REQUEST "Range: a\r\nRange: b\r\n", PV_EPARSE},
    {REQUEST "Content-Length: 1\r\nContent-Length: 1\r\n", PV_EPARSE},
    {REQUEST "Content-Length: -1\r\n", PV_EPARSE},
    {REQUEST "Content-Length: 1234567890123456789\r\n", PV_EPARSE},
    {REQUEST "Content-Length:\r\n", PV_EPARSE},
    {REQUEST "Transfer-Encoding: chunked\r\n", PV_EPARSE},
    {REQUEST "Expect: 100-continue\r\n", PV_EPARSE},
    {REQUEST "Upgrade: h2c\r\n", PV_EPARSE},
    {REQUEST "Seaweed-A: b\r\n", PV_EPARSE},
    {REQUEST "Content-MD5: b\r\n", PV_EPARSE},
    {REQUEST "Connection: close, te\r\n", PV_EPARSE},
    {REQUEST " folded: x\r\n", PV_EPARSE},
    {REQUEST "Accept : x\r\n", PV_EPARSE},
    {REQUEST "Accept: \x01\r\n", PV_EPARSE},
    {REQUEST "Accept: \xc3\xa4\r\n", PV_EPARSE},
    {REQUEST "Accept: a\rb\r\n", PV_EPARSE},
    {REQUEST ": x\r\n", PV_EPARSE},
    {REQUEST "Accept\r\n", PV_EPARSE},
};

static void test_heads(void) {
    t_guard g = t_guard_new(8192);
    for (size_t i = 0; i < PV__ARRAY_LEN(heads); i++) {
        size_t len = strlen(heads[i].text);
        int want = heads[i].rc == 1 ? (int)len : heads[i].rc;
        pv__head whole = {0};
        const char *p = (const char *)t_guard_put(&g, heads[i].text, len);
        int rc = pv__head_feed(&whole, p, len);
        if (rc != want) {
            fprintf(stderr, "head %zu: %s\n", i, heads[i].text);
        }
        CHECK_EQ(rc, want);
        /* Byte by byte, each time at the guard page: the same in the end, and never a wrong step before. */
        pv__head slow = {0};
        rc = PV_EMORE;
        for (size_t n = 1; n <= len && rc == PV_EMORE; n++) {
            p = (const char *)t_guard_put(&g, heads[i].text, n);
            rc = pv__head_feed(&slow, p, n);
            CHECK(rc == PV_EMORE || rc == want);
        }
        CHECK_EQ(rc, want);
        if (want > 0) {
            CHECK_MEM(&slow.fields, &whole.fields, sizeof slow.fields);
            CHECK_EQ(slow.path.at, whole.path.at);
            CHECK_EQ(slow.method, whole.method);
            CHECK_EQ(slow.seen, whole.seen);
        }
        /* One byte flipped: anything but a step outside. */
        for (size_t at = 0; at < len; at++) {
            for (int bit = 0; bit < 8; bit++) {
                uint8_t *q = t_guard_put(&g, heads[i].text, len);
                q[at] ^= (uint8_t)(1 << bit);
                pv__head h = {0};
                rc = pv__head_feed(&h, (const char *)q, len);
                CHECK(rc == PV_EMORE || rc == PV_EPARSE || (rc > 0 && (size_t)rc <= len));
            }
        }
    }
    t_guard_free(&g);
}

static void test_head_fields(void) {
    const char text[] =
        REQUEST "Range:  bytes=1-2\t\r\nContent-Length: 007\r\nConnection: close\r\nOrigin:\r\n\r\nrest";
    pv__head h = {0};
    int rc = pv__head_feed(&h, text, sizeof text - 1);
    CHECK_EQ(rc, sizeof text - 1 - 4);
    CHECK_EQ(h.method, PV__M_GET);
    CHECK(h.close);
    CHECK_EQ(h.content_length, 7);
    CHECK_EQ(h.path.n, sizeof PATH - 1);
    CHECK_MEM(text + h.path.at, PATH, sizeof PATH - 1);
    CHECK_EQ(h.fields[PV__F_RANGE].n, 9);
    CHECK_MEM(text + h.fields[PV__F_RANGE].at, "bytes=1-2", 9);
    CHECK_EQ(h.fields[PV__F_ORIGIN].n, 0);
}

static void test_head_bounds(void) {
    char *text = malloc(3 * PV__HEAD_MAX);
    CHECK(text != NULL);
    size_t at = (size_t)sprintf(text, REQUEST "Accept: ");
    memset(text + at, 'a', 2 * PV__HEAD_MAX);
    pv__head h = {0};
    CHECK_EQ(pv__head_feed(&h, text, PV__HEAD_MAX - 1), PV_EMORE);
    CHECK_EQ(pv__head_feed(&h, text, PV__HEAD_MAX), PV_EPARSE);
    /* Bytes behind the limit are not looked at: they may belong to a body. */
    memcpy(text + PV__HEAD_MAX - 2, "\r\n\r\n", 4);
    pv__head_reset(&h);
    CHECK_EQ(pv__head_feed(&h, text, 2 * PV__HEAD_MAX), PV_EPARSE);
    at = (size_t)sprintf(text, REQUEST);
    for (unsigned i = 1; i <= PV__HEAD_LINES; i++) {
        at += (size_t)sprintf(text + at, "Accept: a\r\n");
    }
    pv__head_reset(&h);
    CHECK_EQ(pv__head_feed(&h, text, at), PV_EPARSE);
    free(text);
}

/* ------------------------------------------------------------------ a lane on the loopback */

typedef struct bench {
    char dir[64];
    pv_vol *v;
    pv_reg *reg;
    pv_mime *mime;
    pv_lane *lane;
    uint16_t port;
} bench;

static bench start(uint32_t flags, uint64_t body_bytes, uint32_t idle_ms) {
    bench b = {.dir = "/tmp/pv-lane-XXXXXX"};
    CHECK(mkdtemp(b.dir) != NULL);
    char dat[96], idx[96];
    snprintf(dat, sizeof dat, "%s/3.dat", b.dir);
    snprintf(idx, sizeof idx, "%s/3.idx", b.dir);
    pv_vol_opts o = {.dat_path = dat, .idx_path = idx, .vid = 3, .flags = PV_VOL_CREATE, .offset_width = 4};
    o.superblock.version = 3;
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(&o, &b.v, &err), 0);
    CHECK_EQ(pv_reg_new(&b.reg), 0);
    CHECK_EQ(pv_reg_publish_as(b.reg, 3, b.v, flags), 0);
    CHECK_EQ(pv_mime_new(&b.mime), 0);
    CHECK_EQ(pv_mime_seal(b.mime), 0);
    pv_lane_opts lo = {.registry = b.reg,
                       .mime = b.mime,
                       .server = "S",
                       .size_limit_bytes = 1 << 20,
                       .body_bytes = body_bytes,
                       .budget_bytes = 1 << 24,
                       .idle_timeout_ms = idle_ms,
                       .threads = 2,
                       .io_threads = 2,
                       .sync_threads = 2,
                       .max_connections = 100,
                       .mailbox = 16,
                       .serve = PV_LANE_READS | PV_LANE_WRITES};
    CHECK_EQ(pv_lane_new(&lo, &b.lane), 0);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof in;
    CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&in, sizeof in) == 0 && listen(fd, 64) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)&in, &len) == 0);
    b.port = ntohs(in.sin_port);
    CHECK_EQ(pv_lane_listen(b.lane, fd, 0), 0);
    CHECK_EQ(pv_lane_start(b.lane), 0);
    return b;
}

static void end(bench *b) {
    pv_lane_stats stats;
    pv_lane_free(b->lane);
    (void)stats;
    pv_reg_free(b->reg);
    CHECK_EQ(pv_vol_close(b->v, NULL), 0);
    pv_vol_unref(b->v);
    pv_mime_free(b->mime);
    char path[96];
    snprintf(path, sizeof path, "%s/3.dat", b->dir);
    CHECK(unlink(path) == 0);
    snprintf(path, sizeof path, "%s/3.idx", b->dir);
    CHECK(unlink(path) == 0);
    CHECK(rmdir(b->dir) == 0);
}

static int dial(const bench *b) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in in = {
        .sin_family = AF_INET, .sin_port = htons(b->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct timeval patience = {20, 0};
    CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&in, sizeof in) == 0);
    CHECK(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) == 0);
    return fd;
}

static void say(int fd, const char *p, size_t n) {
    while (n > 0) {
        ssize_t rc = send(fd, p, n, MSG_NOSIGNAL);
        CHECK(rc > 0);
        p += rc;
        n -= (size_t)rc;
    }
}

/* One answer: its status; the body of Content-Length bytes in body. */
static int hear(int fd, char *body, size_t *n) {
    static _Thread_local char head[65536];
    size_t len = 0;
    while (len < 4 || memcmp(head + len - 4, "\r\n\r\n", 4) != 0) {
        CHECK(len < sizeof head - 1);
        CHECK_EQ(recv(fd, head + len, 1, 0), 1);
        len++;
    }
    head[len] = 0;
    CHECK(memcmp(head, "HTTP/1.1 ", 9) == 0);
    int status = atoi(head + 9);
    const char *told = strstr(head, "\r\nContent-Length: ");
    *n = told != NULL ? (size_t)atol(told + 18) : 0;
    for (size_t got = 0; got < *n;) {
        ssize_t rc = recv(fd, body + got, *n - got, 0);
        CHECK(rc > 0);
        got += (size_t)rc;
    }
    return status;
}

static int ask(int fd, const char *text, char *body, size_t *n) {
    say(fd, text, strlen(text));
    return hear(fd, body, n);
}

#define POST5 "POST " PATH " HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 5\r\n\r\nhello"

static void test_round_trip(void) {
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    int fd = dial(&b);
    char body[4096];
    size_t n;
    CHECK_EQ(ask(fd, POST5, body, &n), 201);
    CHECK_EQ(ask(fd, POST5, body, &n), 204); /* by an I/O thread: there is something to compare with */
    CHECK_EQ(ask(fd, REQUEST "\r\n", body, &n), 200);
    CHECK_EQ(n, 5);
    CHECK_MEM(body, "hello", 5);
    CHECK_EQ(ask(fd, REQUEST "Range: bytes=1-2\r\n\r\n", body, &n), 206);
    CHECK_EQ(n, 2);
    CHECK_MEM(body, "el", 2);
    CHECK_EQ(ask(fd, "DELETE " PATH " HTTP/1.1\r\nHost: h\r\n\r\n", body, &n), 202);
    CHECK(close(fd) == 0);
    end(&b);
}

/* All requests at once, and cut at every byte: the same answers in the same order. */
static void test_pipeline_cut_anywhere(void) {
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    const char text[] = POST5 REQUEST "\r\n" REQUEST "Range: bytes=4-\r\n\r\n" POST5 REQUEST "\r\n";
    static const int want[] = {201, 200, 206, 204, 200};
    size_t len = sizeof text - 1;
    for (size_t cut = 0; cut <= len; cut += cut < 8 || cut > len - 8 ? 1 : 3) {
        int fd = dial(&b);
        char body[4096];
        size_t n;
        say(fd, text, cut);
        if (cut % 2 == 0) {
            struct pollfd p = {fd, POLLIN, 0};
            (void)poll(&p, 1, 1); /* the lane has a chance to see the first part alone */
        }
        say(fd, text + cut, len - cut);
        for (size_t i = 0; i < PV__ARRAY_LEN(want); i++) {
            int status = hear(fd, body, &n);
            CHECK_EQ(status, i == 0 && cut > 0 ? 204 : want[i]);
        }
        CHECK(close(fd) == 0);
    }
    end(&b);
}

/* pv_lane_take, but waits up to timeout_ms for the first. */
static int take_within(pv_lane *l, pv_lane_item *items, size_t max, int timeout_ms) {
    struct pollfd p = {pv_lane_mail_fd(l), POLLIN, 0};
    (void)poll(&p, 1, timeout_ms);
    return pv_lane_take(l, items, max);
}

static void take_one(const bench *b, pv_lane_item *item, const char *want, size_t len, uint32_t why) {
    int rc;
    do {
        rc = take_within(b->lane, item, 1, 1000);
    } while (rc == 0);
    CHECK_EQ(rc, 1);
    CHECK_EQ(item->reason, why);
    CHECK_EQ(item->size, len);
    CHECK_MEM(item->data, want, len);
    CHECK(strcmp(item->host, "127.0.0.1") == 0);
}

/* A request that is not for the lane goes out with all its bytes, behind the answer of the one before; the connection may
 * come back. */
static void test_hand_over_and_back(void) {
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    static const struct {
        const char *text;
        uint32_t why;
    } cases[] = {
        {"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", PV_LANE_WHY_HEAD},
        {REQUEST "X-Odd: 1\r\n", PV_LANE_WHY_HEAD},
        {"GET " PATH "?cm=false HTTP/1.1\r\nHost: h\r\n\r\n", PV_LANE_WHY_QUERY},
        {"GET /3,01deadbee0 HTTP/1.1\r\nHost: h\r\n\r\n", PV_LANE_WHY_NEEDLE},
        {"GET /4,01deadbeef HTTP/1.1\r\nHost: h\r\n\r\nGET", PV_LANE_WHY_VOLUME},
        {"GET /3,xyz HTTP/1.1\r\nHost: h\r\n\r\n", PV_LANE_WHY_PATH},
        {"POST " PATH " HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\nx", PV_LANE_WHY_SIZE},
        {"POST /3,02deadbeef HTTP/1.1\r\nHost: h\r\nContent-Type: application/x-www-form-urlencoded\r\n"
         "Content-Length: 9\r\n\r\nx",
         PV_LANE_WHY_UPLOAD},
        {"POST /3,02deadbeef HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nabc",
         PV_LANE_WHY_UPLOAD},
        {"POST /3,01deadbee0 HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 1\r\n\r\nx",
         PV_LANE_WHY_WRITE},
    };
    int fd = dial(&b);
    char body[4096];
    size_t n;
    CHECK_EQ(ask(fd, POST5, body, &n), 201);
    for (size_t i = 0; i < PV__ARRAY_LEN(cases); i++) {
        char text[4096];
        int len = snprintf(text, sizeof text, "%s%s", REQUEST "\r\n", cases[i].text);
        say(fd, text, (size_t)len);
        CHECK_EQ(hear(fd, body, &n), 200);
        pv_lane_item item;
        take_one(&b, &item, cases[i].text, strlen(cases[i].text), cases[i].why);
        CHECK((item.flags & PV_LANE_SERVED) != 0);
        CHECK_EQ(pv_lane_give(b.lane, item.fd, item.flags), 0);
        pv_lane_item_free(b.lane, &item);
        CHECK_EQ(ask(fd, REQUEST "\r\n", body, &n), 200);
    }
    pv_lane_stats stats;
    pv_lane_stat(b.lane, &stats);
    CHECK_EQ(stats.given, PV__ARRAY_LEN(cases));
    CHECK_EQ(stats.held_bytes, 0);
    CHECK_EQ(stats.connections, 1);
    CHECK(close(fd) == 0);
    end(&b);
}

static void test_who_may_be_written(void) {
    bench b = start(0, 1 << 20, 0); /* replicas and a ttl, for all that is known */
    int fd = dial(&b);
    pv_lane_item item;
    say(fd, POST5, sizeof POST5 - 1);
    take_one(&b, &item, POST5, sizeof POST5 - 1, PV_LANE_WHY_VOLUME);
    pv_lane_item_free(b.lane, &item);
    CHECK(close(item.fd) == 0 && close(fd) == 0);
    pv_lane_serve(b.lane, PV_LANE_WRITES);
    fd = dial(&b);
    say(fd, REQUEST "\r\n", sizeof REQUEST + 1);
    take_one(&b, &item, REQUEST "\r\n", sizeof REQUEST + 1, PV_LANE_WHY_OFF);
    pv_lane_item_free(b.lane, &item);
    CHECK(close(item.fd) == 0 && close(fd) == 0);
    end(&b);
}

/* An answer larger than the socket's buffers, read slowly; a half-closed request; idle ones. */
static void test_slow_half_closed_and_idle(void) {
    bench b = start(PV_REG_SINGLE, 8 << 20, 300);
    size_t len = 1000000; /* of the size limit */
    char *data = malloc(len), *body = malloc(len);
    CHECK(data != NULL && body != NULL);
    for (size_t i = 0; i < len; i++) {
        data[i] = (char)(i * 7 + i / 251);
    }
    int fd = dial(&b);
    char text[256];
    size_t n;
    int head =
        snprintf(text, sizeof text,
                 "PUT " PATH " HTTP/1.1\r\nHost: h\r\nContent-Type: video/mp4\r\nContent-Length: %zu\r\n\r\n", len);
    say(fd, text, (size_t)head);
    say(fd, data, len);
    CHECK_EQ(hear(fd, body, &n), 201);
    enum { TIMES = 12 };
    for (int i = 0; i < TIMES; i++) {
        say(fd, REQUEST "\r\n", sizeof REQUEST + 1);
    }
    for (int i = 0; i < TIMES; i++) {
        CHECK_EQ(hear(fd, body, &n), 200);
        CHECK_EQ(n, len);
        CHECK_MEM(body, data, len);
    }
    say(fd, REQUEST, sizeof REQUEST - 1);
    CHECK(shutdown(fd, SHUT_WR) == 0);
    pv_lane_item item;
    take_one(&b, &item, REQUEST, sizeof REQUEST - 1, PV_LANE_WHY_EOF);
    pv_lane_item_free(b.lane, &item);
    CHECK(close(item.fd) == 0 && close(fd) == 0);
    fd = dial(&b);
    char one;
    CHECK_EQ(recv(fd, &one, 1, 0), 0); /* idle from the start */
    CHECK(close(fd) == 0);
    pv_lane_stats stats;
    pv_lane_stat(b.lane, &stats);
    CHECK_EQ(stats.idle_closed, 1);
    CHECK_EQ(stats.held_bytes, 0);
    CHECK_EQ(stats.connections, 0);
    free(data);
    free(body);
    end(&b);
}

static void test_stop(void) {
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    int idle = dial(&b), half = dial(&b);
    char body[4096];
    size_t n;
    CHECK_EQ(ask(idle, POST5, body, &n), 201);
    CHECK_EQ(ask(half, REQUEST "\r\n", body, &n), 200);
    say(half, REQUEST, sizeof REQUEST - 1);
    pv_lane_quiesce(b.lane);
    CHECK_EQ(recv(idle, body, 1, 0), 0);
    pv_lane_item item;
    CHECK_EQ(pv_lane_take(b.lane, &item, 1), 1);
    CHECK_EQ(item.reason, PV_LANE_WHY_STOP);
    CHECK_EQ(pv_lane_give(b.lane, item.fd, 0), PV_ECLOSED);
    pv_lane_item_free(b.lane, &item);
    CHECK_EQ(pv_lane_take(b.lane, &item, 1), PV_ECLOSED);
    CHECK_EQ(pv_lane_stop(b.lane, 1000), 0);
    CHECK_EQ(pv_lane_stop(b.lane, 1000), 0);
    CHECK(close(item.fd) == 0 && close(idle) == 0 && close(half) == 0);
    end(&b);
}

static void test_full_mailbox_and_limit(void) {
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    int fds[17];
    char body[4096];
    size_t n;
    for (int i = 0; i < 17; i++) {
        fds[i] = dial(&b);
        say(fds[i], "X", 1);
        pv_lane_stats stats;
        do { /* one by one, so that the last is the one too many */
            pv_lane_stat(b.lane, &stats);
        } while (stats.handed_over[PV_LANE_WHY_HEAD] + stats.mailbox_full <= (uint64_t)i);
    }
    CHECK_EQ(hear(fds[16], body, &n), 503);
    for (int i = 0; i < 17; i++) {
        CHECK(close(fds[i]) == 0);
    }
    end(&b);
}

/* A hook that holds the first write of a file until the test lets it go. */
typedef struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool held;
    bool passed;
} gate;

static int gate_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    gate *g = ctx;
    (void)len;
    pv__mutex_lock(&g->lock);
    if (ev->op == PV__IO_PWRITE && !g->held) {
        g->held = true;
        pv__cond_broadcast(&g->changed);
        while (!g->passed) {
            pv__cond_wait(&g->changed, &g->lock);
        }
    }
    pv__mutex_unlock(&g->lock);
    return 0;
}

static void *slow_writer(void *arg) {
    const pv_needle n = {.id = 77, .cookie = 1, .data = (const uint8_t *)"slow", .data_size = 4};
    pv_write_res res;
    CHECK_EQ(pv_vol_write(arg, &n, 0, NULL, &res, NULL), 0);
    return NULL;
}

/* A change that a disk holds up keeps those waiting that come behind it, but no lane thread: reads are served. */
static void test_a_slow_change_holds_up_no_lane_thread(void) {
    enum { CONNECTIONS = 12 };
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    char body[4096];
    size_t n;
    int writer = dial(&b), deleter = dial(&b), readers[CONNECTIONS];
    CHECK_EQ(ask(writer, POST5, body, &n), 201);
    CHECK_EQ(ask(deleter, "POST /3,02deadbeef HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 2\r\n\r\nhi",
                 body, &n),
             201);
    for (int i = 0; i < CONNECTIONS; i++) {
        readers[i] = dial(&b);
        CHECK_EQ(ask(readers[i], REQUEST "\r\n", body, &n), 200); /* each is with its thread now */
    }
    gate g = {0};
    CHECK_EQ(pv__mutex_init(&g.lock), 0);
    CHECK_EQ(pv__cond_init(&g.changed), 0);
    pv__io_set_hook(gate_hook, &g);
    pthread_t slow;
    CHECK_EQ(pthread_create(&slow, NULL, slow_writer, b.v), 0);
    pv__mutex_lock(&g.lock);
    while (!g.held) {
        pv__cond_wait(&g.changed, &g.lock);
    }
    pv__mutex_unlock(&g.lock);
    static const char fresh[] =
        "POST /3,03deadbeef HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 3\r\n\r\nnew";
    static const char remove[] = "DELETE /3,02deadbeef HTTP/1.1\r\nHost: h\r\n\r\n";
    say(writer, fresh, sizeof fresh - 1);
    say(deleter, remove, sizeof remove - 1);
    pv_lane_stats stats;
    do {
        pv_lane_stat(b.lane, &stats);
    } while (stats.io_jobs < 2);
    for (int i = 0; i < CONNECTIONS; i++) {
        CHECK_EQ(ask(readers[i], REQUEST "\r\n", body, &n), 200);
        CHECK(close(readers[i]) == 0);
    }
    char early;
    CHECK_EQ(recv(writer, &early, 1, MSG_DONTWAIT), -1);
    pv__mutex_lock(&g.lock);
    g.passed = true;
    pv__cond_broadcast(&g.changed);
    pv__mutex_unlock(&g.lock);
    CHECK_EQ(hear(writer, body, &n), 201);
    CHECK_EQ(hear(deleter, body, &n), 202);
    CHECK_EQ(pthread_join(slow, NULL), 0);
    pv__io_set_hook(NULL, NULL);
    CHECK(close(writer) == 0 && close(deleter) == 0);
    CHECK_EQ(pthread_mutex_destroy(&g.lock), 0);
    CHECK_EQ(pthread_cond_destroy(&g.changed), 0);
    end(&b);
}

static int head_gate_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    gate *g = ctx;
    pv__mutex_lock(&g->lock);
    if (ev->op == PV__IO_PREAD && *len == PV_NEEDLE_HEADER + 4 && !g->held) {
        g->held = true;
        pv__cond_broadcast(&g->changed);
        while (!g->passed) {
            pv__cond_wait(&g->changed, &g->lock);
        }
    }
    pv__mutex_unlock(&g->lock);
    return 0;
}

/* A needle that was deleted, or is empty, is read for its cookie when it is written again: by a lane thread it was. */
static void test_a_slow_look_at_what_was_there_holds_up_no_lane_thread(void) {
    enum { CONNECTIONS = 12 };
    static const char again[] =
        "POST /3,02deadbeef HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nContent-Length: 3\r\n\r\nnew";
    static const char remove[] = "DELETE /3,02deadbeef HTTP/1.1\r\nHost: h\r\n\r\n";
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    char body[4096];
    size_t n;
    int writer = dial(&b), readers[CONNECTIONS];
    CHECK_EQ(ask(writer, POST5, body, &n), 201);
    CHECK_EQ(ask(writer, again, body, &n), 201);
    CHECK_EQ(ask(writer, remove, body, &n), 202);
    for (int i = 0; i < CONNECTIONS; i++) {
        readers[i] = dial(&b);
        CHECK_EQ(ask(readers[i], REQUEST "\r\n", body, &n), 200);
    }
    gate g = {0};
    CHECK_EQ(pv__mutex_init(&g.lock), 0);
    CHECK_EQ(pv__cond_init(&g.changed), 0);
    pv__io_set_hook(head_gate_hook, &g);
    say(writer, again, sizeof again - 1);
    pv__mutex_lock(&g.lock);
    while (!g.held) {
        pv__cond_wait(&g.changed, &g.lock);
    }
    pv__mutex_unlock(&g.lock);
    for (int i = 0; i < CONNECTIONS; i++) {
        CHECK_EQ(ask(readers[i], REQUEST "\r\n", body, &n), 200);
        CHECK(close(readers[i]) == 0);
    }
    pv__mutex_lock(&g.lock);
    g.passed = true;
    pv__cond_broadcast(&g.changed);
    pv__mutex_unlock(&g.lock);
    CHECK_EQ(hear(writer, body, &n), 201);
    pv__io_set_hook(NULL, NULL);
    CHECK(close(writer) == 0);
    CHECK_EQ(pthread_mutex_destroy(&g.lock), 0);
    CHECK_EQ(pthread_cond_destroy(&g.changed), 0);
    end(&b);
}

/* The row of a map in a file is not in the page cache, so often. */
static int no_row_hook(void *ctx, const pv__io_event *ev, size_t *len) {
    _Atomic int *times = ctx;
    return ev->op == PV__IO_PREAD && *len == 16 && atomic_fetch_sub(times, 1) > 0 ? EAGAIN : 0;
}

static void test_a_map_in_a_file_is_waited_for_elsewhere(void) {
    static const char remove[] = "DELETE /3,01deadbeef HTTP/1.1\r\nHost: h\r\n\r\n";
    bench b = start(PV_REG_SINGLE, 1 << 20, 0);
    char body[4096], dat[96], idx[96], sdx[96];
    size_t n;
    int fd = dial(&b);
    CHECK_EQ(ask(fd, POST5, body, &n), 201);
    snprintf(dat, sizeof dat, "%s/3.dat", b.dir);
    snprintf(idx, sizeof idx, "%s/3.idx", b.dir);
    snprintf(sdx, sizeof sdx, "%s/3.sdx", b.dir);
    pv_vol_opts o = {.dat_path = dat, .idx_path = idx, .sdx_path = sdx, .vid = 3, .flags = PV_VOL_SORTED_MAP};
    o.offset_width = 4;
    pv_vol *sorted;
    CHECK_EQ(pv_vol_open(&o, &sorted, NULL), 0);
    CHECK_EQ(pv_reg_withdraw(b.reg, 3), 0);
    CHECK_EQ(pv_reg_publish_as(b.reg, 3, sorted, PV_REG_SINGLE), 0);
    _Atomic int times = 0;
    pv_lane_stats stats;
    pv__io_set_hook(no_row_hook, &times);
    CHECK_EQ(ask(fd, REQUEST "\r\n", body, &n), 200);
    pv_lane_stat(b.lane, &stats);
    CHECK_EQ(stats.io_jobs, 0);
    atomic_store(&times, 1);
    CHECK_EQ(ask(fd, REQUEST "\r\n", body, &n), 200);
    CHECK_EQ(n, 5);
    pv_lane_stat(b.lane, &stats);
    CHECK_EQ(stats.io_jobs, 1);
    atomic_store(&times, 1);
    CHECK_EQ(ask(fd, remove, body, &n), 202);
    pv_lane_stat(b.lane, &stats);
    CHECK_EQ(stats.io_jobs, 2);
    pv__io_set_hook(NULL, NULL);
    CHECK(close(fd) == 0);
    CHECK_EQ(pv_reg_withdraw(b.reg, 3), 0);
    CHECK_EQ(pv_vol_close(sorted, NULL), 0);
    pv_vol_unref(sorted);
    CHECK(unlink(sdx) == 0);
    end(&b);
}

int main(void) {
    RUN(test_heads);
    RUN(test_head_fields);
    RUN(test_head_bounds);
    RUN(test_round_trip);
    RUN(test_pipeline_cut_anywhere);
    RUN(test_hand_over_and_back);
    RUN(test_who_may_be_written);
    RUN(test_slow_half_closed_and_idle);
    RUN(test_stop);
    RUN(test_full_mailbox_and_limit);
    RUN(test_a_slow_change_holds_up_no_lane_thread);
    RUN(test_a_slow_look_at_what_was_there_holds_up_no_lane_thread);
    RUN(test_a_map_in_a_file_is_waited_for_elsewhere);
    return T_END();
}
