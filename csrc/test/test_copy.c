/* Routes to replicas, and copies sent to a peer that answers as each test wants (pv_copy). */
#include "t.h"

#include "../pv_copy_int.h"

#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>

typedef struct peer {
    int listener;
    const char *answer;      /* to each request; NULL: closes without one */
    unsigned per_connection; /* requests answered before it is closed */
    char host[32];
    pthread_t thread;
    _Atomic unsigned connections;
    _Atomic unsigned requests;
    _Atomic bool end;
    size_t len; /* of the last request */
    char last[8192];
} peer;

static bool serve_one(peer *p, int fd) {
    size_t n = 0;
    size_t want = 0;
    while (n < sizeof p->last - 1) {
        ssize_t got = recv(fd, p->last + n, sizeof p->last - 1 - n, 0);
        if (got <= 0) {
            return false;
        }
        n += (size_t)got;
        p->last[n] = '\0';
        const char *end = strstr(p->last, "\r\n\r\n");
        const char *length = strstr(p->last, "Content-Length: ");
        if (end != NULL && length != NULL) {
            want = (size_t)(end - p->last) + 4 + (size_t)strtoul(length + 16, NULL, 10);
            if (n >= want) {
                break;
            }
        }
    }
    p->len = n;
    atomic_fetch_add(&p->requests, 1);
    return p->answer != NULL && send(fd, p->answer, strlen(p->answer), MSG_NOSIGNAL) > 0;
}

static void *peer_main(void *arg) {
    peer *p = arg;
    for (;;) {
        int fd = accept(p->listener, NULL, NULL);
        if (fd < 0 || atomic_load(&p->end)) {
            if (fd >= 0) {
                close(fd);
            }
            return NULL;
        }
        atomic_fetch_add(&p->connections, 1);
        for (unsigned i = 0; i < p->per_connection && serve_one(p, fd); i++) {
        }
        close(fd);
    }
}

static void peer_start(peer *p, const char *answer, unsigned per_connection) {
    memset(p, 0, sizeof *p);
    p->answer = answer;
    p->per_connection = per_connection;
    p->listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof in;
    CHECK(bind(p->listener, (struct sockaddr *)&in, len) == 0 && listen(p->listener, 16) == 0);
    CHECK(getsockname(p->listener, (struct sockaddr *)&in, &len) == 0);
    snprintf(p->host, sizeof p->host, "127.0.0.1:%u", ntohs(in.sin_port));
    CHECK(pthread_create(&p->thread, NULL, peer_main, p) == 0);
}

static void peer_end(peer *p) {
    atomic_store(&p->end, true);
    CHECK(shutdown(p->listener, SHUT_RDWR) == 0);
    CHECK(pthread_join(p->thread, NULL) == 0);
    close(p->listener);
}

static pv__targets targets_of(const char *hosts) {
    pv__routes r;
    pv__targets to = {0};
    CHECK_EQ(pv__routes_init(&r), 0);
    CHECK_EQ(pv__routes_set(&r, 7, hosts, 10), 0);
    CHECK(pv__routes_find(&r, 7, 2, 9, &to));
    pv__routes_destroy(&r);
    return to;
}

static const uint8_t data[] = "the needle's data";

static pv__copy a_copy(void) {
    return (pv__copy){.path = {"/7,0102", 7},
                      .last_modified_s = 1700000000,
                      .name = {"a b.txt", 7},
                      .mime = {"text/x", 6},
                      .request_id = {"ID", 2},
                      .data = data,
                      .data_len = sizeof data - 1};
}

#define OK "HTTP/1.1 201 Created\r\nContent-Length: 10\r\n\r\n{\"size\":1}"

static void test_routes(void) {
    pv__routes r;
    pv__targets to;
    CHECK_EQ(pv__routes_init(&r), 0);
    CHECK(!pv__routes_find(&r, 0, 1, 0, &to)); /* no entry at all, whose vid would be 0 */
    CHECK_EQ(pv__routes_set(&r, 7, "10.0.0.1:8080 [::1]:80", 100), 0);
    CHECK(pv__routes_find(&r, 7, 3, 99, &to));
    CHECK_EQ(to.count, 2);
    CHECK(strcmp(to.at[1].host, "[::1]:80") == 0 && to.at[1].addr.ss_family == AF_INET6);
    CHECK(!pv__routes_find(&r, 7, 4, 99, &to));  /* too few for so many copies */
    CHECK(!pv__routes_find(&r, 7, 3, 100, &to)); /* over */
    CHECK(!pv__routes_find(&r, 8, 2, 1, &to));
    CHECK(pv__routes_stands(&r, 7, to.stamp));
    CHECK_EQ(pv__routes_set(&r, 7 + PV__COPY_SLOTS, "", 100), 0); /* nothing for another id leaves this one */
    CHECK(pv__routes_stands(&r, 7, to.stamp));
    pv__routes_drop(&r, 7, to.stamp + 1);
    CHECK(pv__routes_stands(&r, 7, to.stamp));
    pv__routes_drop(&r, 7, to.stamp);
    CHECK(!pv__routes_find(&r, 7, 2, 1, &to));
    static const char *const bad[] = {"localhost:80", "10.0.0.1",
                                      "10.0.0.1:0",   "10.0.0.1:65536",
                                      ":80",          "10.0.0.1:80 ::",
                                      "1.1.1.1:8x",   " 10.0.0.1:80",
                                      "[::1:80",      "1.1.1.1:1 1.1.1.1:2 1.1.1.1:3 1.1.1.1:4 1.1.1.1:5"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_EQ(pv__routes_set(&r, 7, "10.0.0.1:80", 100), 0);
        CHECK_EQ(pv__routes_set(&r, 7, bad[i], 100), PV_EINVAL);
        CHECK(!pv__routes_find(&r, 7, 2, 1, &to));
    }
    pv__routes_destroy(&r);
}

static void test_request_and_kept_connection(void) {
    peer p;
    peer_start(&p, OK, 100);
    pv__targets to = targets_of(p.host);
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    for (unsigned i = 0; i < 5; i++) {
        CHECK_EQ(pv__copy_send(&conns, &to, &what), 0);
    }
    what.fsync = true;
    CHECK_EQ(pv__copy_send(&conns, &to, &what), 0);
    pv__copy_close(&conns);
    peer_end(&p);
    CHECK_EQ(p.connections, 1);
    CHECK_EQ(p.requests, 6);
    const char *line = "POST /7,0102?fsync=true&ts=1700000000&ttl=&type=replicate HTTP/1.1\r\nHost: 127.0.0.1:";
    CHECK(strncmp(p.last, line, strlen(line)) == 0);
    CHECK(strstr(p.last, "\r\nContent-Disposition: form-data; filename=\"a b.txt\"; name=file\r\n"
                         "Content-Type: text/x\r\nIdempotency-Key: http://127.0.0.1:") != NULL);
    CHECK(strstr(p.last, "\r\n\r\nthe needle's data\r\n--") != NULL);
}

static void test_connection_that_was_closed_meanwhile(void) {
    peer p;
    peer_start(&p, OK, 1);
    pv__targets to = targets_of(p.host);
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    for (unsigned i = 0; i < 20; i++) {
        CHECK_EQ(pv__copy_send(&conns, &to, &what), 0);
    }
    pv__copy_close(&conns);
    peer_end(&p);
    CHECK_EQ(p.requests, 20);
}

static void test_answers_that_are_no_success(void) {
    static const char *const answers[] = {
        NULL,
        "HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 201 Created\r\nContent-Length: 13\r\n\r\n{\"error\":\"x\"}",
        "HTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\nabcd",
        "HTTP/1.1 201 Created\r\nContent-Length: 3\r\n\r\n{\0}",
        "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 201 Created\r\nContent-Length: 99999\r\n\r\n{}",
        "HTTP/1.1 201 Created\r\nContent-Length: 999999\r\n\r\n{}",
        "HTTP/1.1 201 Created\r\nContent-Length: x\r\n\r\n{}",
        "HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        "HTTP/1.0 201 Created\r\nContent-Length: 2\r\n\r\n{}",
        "garbage\r\n\r\n",
        "\r\n\r\n",
    };
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        peer p;
        peer_start(&p, answers[i], 1);
        pv__targets to = targets_of(p.host);
        pv__copy_conns conns = {0};
        pv__copy what = a_copy();
        CHECK_EQ(pv__copy_send(&conns, &to, &what), PV_ESYS);
        pv__copy_close(&conns);
        peer_end(&p);
        CHECK_EQ(p.requests, 1);
    }
}

static void test_empty_data_and_no_content(void) {
    peer p;
    peer_start(&p, "HTTP/1.1 204 No Content\r\nConnection: Close\r\n\r\n", 9);
    pv__targets to = targets_of(p.host);
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    what.data_len = 0;
    what.mime = what.name = (pv_text){NULL, 0};
    CHECK_EQ(pv__copy_send(&conns, &to, &what), 0);
    CHECK_EQ(conns.kept[0].fd, 0);
    pv__copy_close(&conns);
    peer_end(&p);
    CHECK(strstr(p.last, "filename=\"\"; name=file\r\nIdempotency-Key: ") != NULL);
}

static void test_nobody_there(void) {
    peer p;
    peer_start(&p, OK, 1);
    char hosts[80];
    snprintf(hosts, sizeof hosts, "127.0.0.1:1 %s", p.host);
    pv__targets to = targets_of(hosts);
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    CHECK_EQ(pv__copy_send(&conns, &to, &what), PV_ESYS);
    pv__copy_close(&conns);
    peer_end(&p);
    CHECK_EQ(p.requests, 1); /* the other one has it */
}

/* Texts as long as the lane lets through. */
static void test_longest_texts(void) {
    char path[1024], name[255], mime[255];
    memset(path, 'p', sizeof path);
    memset(name, '"', sizeof name);
    memset(mime, 'm', sizeof mime);
    path[0] = '/';
    peer p;
    peer_start(&p, OK, 1);
    pv__targets to = targets_of(p.host);
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    what.path = (pv_text){path, sizeof path};
    what.name = (pv_text){name, sizeof name};
    what.mime = (pv_text){mime, sizeof mime};
    CHECK_EQ(pv__copy_send(&conns, &to, &what), 0);
    pv__copy_close(&conns);
    peer_end(&p);
}

typedef struct shared {
    pv__routes routes;
    const char *hosts;
    _Atomic unsigned stored;
} shared;

static void *sender(void *arg) {
    shared *s = arg;
    pv__copy_conns conns = {0};
    pv__copy what = a_copy();
    for (unsigned i = 0; i < 50; i++) {
        pv__targets to;
        if (pv__routes_find(&s->routes, 7, 2, 1, &to) && pv__routes_stands(&s->routes, 7, to.stamp) &&
            pv__copy_send(&conns, &to, &what) == 0) {
            atomic_fetch_add(&s->stored, 1);
        }
        pv__routes_drop(&s->routes, 7, i);
        CHECK_EQ(pv__routes_set(&s->routes, 7, s->hosts, 10), 0);
    }
    pv__copy_close(&conns);
    return NULL;
}

static void test_threads(void) {
    peer p;
    peer_start(&p, OK, 1);
    shared s = {.hosts = p.host};
    CHECK_EQ(pv__routes_init(&s.routes), 0);
    CHECK_EQ(pv__routes_set(&s.routes, 7, s.hosts, 10), 0);
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++) {
        CHECK(pthread_create(&threads[i], NULL, sender, &s) == 0);
    }
    for (size_t i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    peer_end(&p);
    pv__routes_destroy(&s.routes);
    CHECK(s.stored > 0);
}

int main(void) {
    RUN(test_routes);
    RUN(test_request_and_kept_connection);
    RUN(test_connection_that_was_closed_meanwhile);
    RUN(test_answers_that_are_no_success);
    RUN(test_empty_data_and_no_content);
    RUN(test_nobody_there);
    RUN(test_longest_texts);
    RUN(test_threads);
    return T_END();
}
