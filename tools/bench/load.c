/* load - a closed-loop HTTP/1.1 load generator on one thread: N keep-alive connections, one request in flight on each.
 *
 *   load HOST PORT CONNECTIONS SECONDS get PATHS_FILE
 *   load HOST PORT CONNECTIONS SECONDS put PATH_FORMAT BODY_BYTES      (PATH_FORMAT takes one %llx: a rising number)
 *   load HOST PORT CONNECTIONS SECONDS post PATH_FORMAT BODY_BYTES     (multipart/form-data, as filers send chunks)
 *
 * Prints one line of JSON: requests, errors, seconds, bytes, latency percentiles in microseconds. A reply counts as an error
 * unless its status is 200, 201 or 206. Only loopback addresses are accepted.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, HEAD_MAX = 16384, DRAIN = 1 << 18, MAX_SAMPLES = 4000000 };

typedef struct conn {
    int fd;
    char head[HEAD_MAX]; /* reply head as far as it came */
    size_t head_len;
    long long body_left; /* -1: head not complete */
    char out[2048];
    size_t out_len;
    size_t out_at;
    size_t body_at; /* of the request body and its trailer */
    uint64_t began_ns;
    int status;
} conn;

static struct sockaddr_in addr;
static char **paths;
static size_t path_count, next_path;
static const char *path_format;
static unsigned long long next_id;
static char *body;
static size_t body_len;
static int method; /* 0 get, 1 put, 2 post */
static uint32_t *samples_us;
static size_t sample_count;
static unsigned long long requests, errors, bytes_moved;
static const char BOUNDARY[] = "----pyvolumebench0123456789";

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int open_conn(conn *c, int ep) {
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0)
        return -1;
    if (connect(c->fd, (struct sockaddr *)&addr, sizeof addr) < 0) {
        close(c->fd);
        return -1;
    }
    int one = 1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    return epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &ev);
}

static void begin(conn *c) {
    c->head_len = 0;
    c->body_left = -1;
    c->out_at = c->body_at = 0;
    c->status = 0;
    c->began_ns = now_ns();
    int n;
    if (method == 0) {
        n = snprintf(c->out, sizeof c->out, "GET %s HTTP/1.1\r\nHost: bench\r\n\r\n", paths[next_path]);
        next_path = (next_path + 1) % path_count;
    } else {
        char path[512];
        snprintf(path, sizeof path, path_format, ++next_id);
        n = snprintf(c->out, sizeof c->out, "%s %s HTTP/1.1\r\nHost: bench\r\nContent-Type: %s%s\r\nContent-Length: %zu\r\n\r\n",
                     method == 1 ? "PUT" : "POST", path,
                     method == 1 ? "application/octet-stream" : "multipart/form-data; boundary=", method == 1 ? "" : BOUNDARY,
                     body_len);
    }
    c->out_len = (size_t)n;
}

/* 1: all sent, 0: would block, -1: broken */
static int push(conn *c) {
    while (c->out_at < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL | (method ? MSG_MORE : 0));
        if (n < 0)
            return errno == EAGAIN ? 0 : -1;
        c->out_at += (size_t)n;
    }
    while (method && c->body_at < body_len) {
        ssize_t n = send(c->fd, body + c->body_at, body_len - c->body_at, MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN ? 0 : -1;
        c->body_at += (size_t)n;
    }
    return 1;
}

static void done(conn *c) {
    uint64_t us = (now_ns() - c->began_ns) / 1000;
    if (sample_count < MAX_SAMPLES)
        samples_us[sample_count++] = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
    requests++;
    if (c->status != 200 && c->status != 201 && c->status != 206)
        errors++;
    else if (method)
        bytes_moved += body_len;
}

/* 1: a reply is complete, 0: would block, -1: broken */
static int pull(conn *c) {
    static char drain[DRAIN];
    for (;;) {
        if (c->body_left < 0) {
            ssize_t n = recv(c->fd, c->head + c->head_len, HEAD_MAX - 1 - c->head_len, 0);
            if (n <= 0)
                return n < 0 && errno == EAGAIN ? 0 : -1;
            c->head_len += (size_t)n;
            c->head[c->head_len] = 0;
            char *end = strstr(c->head, "\r\n\r\n");
            if (!end) {
                if (c->head_len >= HEAD_MAX - 1)
                    return -1;
                continue;
            }
            c->status = atoi(c->head + 9);
            *end = 0;
            char *cl = strcasestr(c->head, "\r\ncontent-length:");
            if (!cl && c->status != 204)
                return -1;
            long long want = cl ? atoll(cl + 17) : 0;
            size_t have = c->head_len - (size_t)(end + 4 - c->head);
            if (!method)
                bytes_moved += have;
            c->body_left = want - (long long)have;
        }
        if (c->body_left <= 0)
            return c->body_left == 0 ? 1 : -1;
        ssize_t n = recv(c->fd, drain, c->body_left < DRAIN ? (size_t)c->body_left : DRAIN, 0);
        if (n <= 0)
            return n < 0 && errno == EAGAIN ? 0 : -1;
        if (!method)
            bytes_moved += (unsigned long long)n;
        c->body_left -= n;
        if (c->body_left == 0)
            return 1;
    }
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static int load_paths(const char *file) {
    FILE *f = fopen(file, "r");
    if (!f)
        return -1;
    char line[512];
    size_t cap = 0;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\r\n")] = 0;
        if (path_count == cap) {
            cap = cap ? cap * 2 : 1024;
            paths = realloc(paths, cap * sizeof *paths);
            if (!paths)
                exit(2);
        }
        paths[path_count++] = strdup(line);
    }
    fclose(f);
    return path_count ? 0 : -1;
}

static void make_body(size_t n) {
    char before[512] = "", after[128] = "";
    if (method == 2) {
        snprintf(before, sizeof before,
                 "--%s\r\nContent-Disposition: form-data; name=\"file\"; filename=\"chunk\"\r\n"
                 "Content-Type: application/octet-stream\r\n\r\n",
                 BOUNDARY);
        snprintf(after, sizeof after, "\r\n--%s--\r\n", BOUNDARY);
    }
    body_len = strlen(before) + n + strlen(after);
    body = malloc(body_len + 1);
    if (!body)
        exit(2);
    memcpy(body, before, strlen(before));
    uint64_t x = 88172645463325252u; /* fixed seed: bytes that do not compress */
    for (size_t i = 0; i < n; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        body[strlen(before) + i] = (char)(x >> 32);
    }
    memcpy(body + strlen(before) + n, after, strlen(after));
}

int main(int argc, char **argv) {
    if (argc < 7) {
        fprintf(stderr, "usage: load HOST PORT CONNECTIONS SECONDS get PATHS_FILE | put|post PATH_FORMAT BODY_BYTES [FIRST_ID]\n");
        return 2;
    }
    addr.sin_family = AF_INET;
    addr.sin_port = htons((uint16_t)atoi(argv[2]));
    if (inet_pton(AF_INET, argv[1], &addr.sin_addr) != 1 || (ntohl(addr.sin_addr.s_addr) >> 24) != 127) {
        fprintf(stderr, "load: only loopback addresses\n");
        return 2;
    }
    int n = atoi(argv[3]);
    double seconds = atof(argv[4]);
    method = !strcmp(argv[5], "get") ? 0 : !strcmp(argv[5], "put") ? 1 : 2;
    if (n < 1 || n > MAX_CONNECTIONS || seconds <= 0 || seconds > 600 || (method && argc < 8)) {
        fprintf(stderr, "load: bad arguments\n");
        return 2;
    }
    if (method == 0 ? load_paths(argv[6]) : 0) {
        fprintf(stderr, "load: no paths in %s\n", argv[6]);
        return 2;
    }
    if (method) {
        path_format = argv[6];
        make_body((size_t)atoll(argv[7]));
        next_id = argc > 8 ? strtoull(argv[8], NULL, 10) : 0;
    }
    samples_us = malloc(MAX_SAMPLES * sizeof *samples_us);
    conn *all = calloc((size_t)n, sizeof *all);
    int ep = epoll_create1(0);
    if (!samples_us || !all || ep < 0)
        return 2;
    for (int i = 0; i < n; i++) {
        if (open_conn(&all[i], ep) < 0) {
            perror("load: connect");
            return 2;
        }
        begin(&all[i]);
    }
    uint64_t start = now_ns(), end = start + (uint64_t)(seconds * 1e9);
    int live = n;
    while (live > 0 && now_ns() < end) {
        struct epoll_event ev[256];
        int k = epoll_wait(ep, ev, 256, 100);
        for (int i = 0; i < k; i++) {
            conn *c = ev[i].data.ptr;
            int sent = push(c);
            int got = pull(c);
            if (got == 1) {
                done(c);
                begin(c);
                sent = push(c);
            }
            if (got < 0 || sent < 0) {
                errors++;
                close(c->fd);
                if (open_conn(c, ep) < 0) {
                    live--;
                    continue;
                }
                begin(c);
                sent = 0;
            }
            struct epoll_event want = {.events = EPOLLIN | (sent == 1 ? 0u : (unsigned)EPOLLOUT), .data.ptr = c};
            epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &want);
        }
    }
    double took = (double)(now_ns() - start) / 1e9;
    qsort(samples_us, sample_count, sizeof *samples_us, by_value);
#define P(q) (sample_count ? samples_us[(size_t)((double)(sample_count - 1) * (q))] : 0)
    printf("{\"requests\":%llu,\"errors\":%llu,\"seconds\":%.3f,\"bytes\":%llu,\"p50_us\":%u,\"p99_us\":%u,\"max_us\":%u,"
           "\"last_id\":%llu}\n",
           requests, errors, took, bytes_moved, P(0.5), P(0.99), P(1.0), next_id);
    return 0;
}
