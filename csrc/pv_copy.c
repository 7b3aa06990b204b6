/* pv_copy.c - copies of needles for the other servers of a volume: where they go, and the requests.
 *
 * The requests are those of contract replication-tiering.md A4, the same that ops/replicate.py sends. Only the plain case is
 * done here; whatever is not an answer that says "stored" is the other lane's to repeat, to judge and to tell. */
#include "pv_copy_int.h"

#include "pv_http_int.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/random.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define CONNECT_MS 1000U
#define EXCHANGE_MS 3000U /* and a second for each MiB */
#define IDLE_MS 60000U    /* the peers' limit is longer */
#define HEAD_CAP 4096U
#define REPLY_CAP 8192U
#define BOUNDARY_BYTES 30U

typedef struct pv__route {
    uint32_t vid;
    uint64_t until_ms;
    pv__targets to; /* count 0: free */
} pv__route;

static uint64_t clock_ms(void) {
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

/* ------------------------------------------------------------------ routes */

int pv__routes_init(pv__routes *r) {
    r->stamp = 0;
    r->slots = pv__calloc(PV__COPY_SLOTS, sizeof *r->slots);
    if (r->slots == NULL || pv__mutex_init(&r->lock) < 0) {
        pv__free(r->slots);
        r->slots = NULL;
        return PV_ENOMEM;
    }
    return 0;
}

void pv__routes_destroy(pv__routes *r) {
    if (r->slots != NULL) {
        pv__must(pthread_mutex_destroy(&r->lock));
        pv__free(r->slots);
        r->slots = NULL;
    }
}

/* `1.2.3.4:80` or `[::1]:80`. */
static int parse_target(const char *p, size_t n, pv__target *to) {
    char host[sizeof to->host];
    if (n == 0 || n >= sizeof host) {
        return PV_EINVAL;
    }
    memset(to, 0, sizeof *to);
    memcpy(to->host, p, n);
    memcpy(host, to->host, sizeof host);
    char *colon = strrchr(host, ':');
    if (colon == NULL) {
        return PV_EINVAL;
    }
    *colon = '\0';
    uint32_t port = 0;
    for (const char *d = colon + 1; *d != '\0'; d++) {
        if (*d < '0' || *d > '9' || port > 65535) {
            return PV_EINVAL;
        }
        port = port * 10 + (uint32_t)(*d - '0');
    }
    if (port == 0 || port > 65535) {
        return PV_EINVAL;
    }
    struct sockaddr_in in4 = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &in4.sin_addr) == 1) {
        memcpy(&to->addr, &in4, sizeof in4);
        to->addr_len = sizeof in4;
        return 0;
    }
    size_t len = strlen(host);
    if (len > 2 && host[0] == '[' && host[len - 1] == ']') {
        host[len - 1] = '\0';
        if (inet_pton(AF_INET6, host + 1, &in6.sin6_addr) == 1) {
            memcpy(&to->addr, &in6, sizeof in6);
            to->addr_len = sizeof in6;
            return 0;
        }
    }
    return PV_EINVAL;
}

int pv__routes_set(pv__routes *r, uint32_t vid, const char *hosts, uint64_t until_ms) {
    pv__targets to = {0};
    int rc = 0;
    while (*hosts != '\0' && rc == 0) {
        size_t n = strcspn(hosts, " ");
        rc = to.count == PV__COPIES_MAX ? PV_EINVAL : parse_target(hosts, n, &to.at[to.count]);
        to.count += rc == 0;
        hosts += n + (hosts[n] == ' ');
    }
    if (rc < 0) {
        to.count = 0;
    }
    pv__mutex_lock(&r->lock);
    pv__route *slot = &r->slots[vid % PV__COPY_SLOTS];
    if (to.count != 0 || slot->vid == vid) {
        to.stamp = ++r->stamp;
        *slot = (pv__route){vid, until_ms, to};
    }
    pv__mutex_unlock(&r->lock);
    return rc;
}

bool pv__routes_find(pv__routes *r, uint32_t vid, uint32_t copies, uint64_t now_ms, pv__targets *to) {
    pv__mutex_lock(&r->lock);
    const pv__route *slot = &r->slots[vid % PV__COPY_SLOTS];
    bool found = slot->vid == vid && slot->to.count != 0 && now_ms < slot->until_ms && slot->to.count + 1 >= copies;
    if (found) {
        *to = slot->to;
    }
    pv__mutex_unlock(&r->lock);
    return found;
}

bool pv__routes_stands(pv__routes *r, uint32_t vid, uint64_t stamp) {
    pv__mutex_lock(&r->lock);
    const pv__route *slot = &r->slots[vid % PV__COPY_SLOTS];
    bool stands = slot->vid == vid && slot->to.count != 0 && slot->to.stamp == stamp;
    pv__mutex_unlock(&r->lock);
    return stands;
}

void pv__routes_drop(pv__routes *r, uint32_t vid, uint64_t stamp) {
    pv__mutex_lock(&r->lock);
    pv__route *slot = &r->slots[vid % PV__COPY_SLOTS];
    if (slot->vid == vid && slot->to.stamp == stamp) {
        slot->to.count = 0;
    }
    pv__mutex_unlock(&r->lock);
}

/* ------------------------------------------------------------------ one exchange */

/* Waits for an event on fd until the deadline. */
static bool wait_fd(int fd, short events, uint64_t due_ms) {
    for (;;) {
        uint64_t now = clock_ms();
        if (now >= due_ms) {
            return false;
        }
        struct pollfd p = {.fd = fd, .events = events};
        int rc = poll(&p, 1, (int)(due_ms - now));
        if (rc > 0) {
            return true;
        }
        if (rc == 0 || errno != EINTR) {
            return false;
        }
    }
}

static int dial(const pv__target *to) {
    int fd = socket(to->addr.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        return -1;
    }
    int one = 1;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    int rc = connect(fd, (const struct sockaddr *)&to->addr, to->addr_len);
    if (rc < 0 && errno == EINPROGRESS && wait_fd(fd, POLLOUT, clock_ms() + CONNECT_MS)) {
        int err = 0;
        socklen_t len = sizeof err;
        rc = getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &len) == 0 && err == 0 ? 0 : -1;
    }
    if (rc < 0) {
        (void)close(fd);
        return -1;
    }
    return fd;
}

/* A kept connection to the target that nothing has happened on, or -1. It is the caller's then. */
static int take_kept(pv__copy_conns *conns, const pv__target *to) {
    uint64_t now = clock_ms();
    for (size_t i = 0; i < PV__COPY_KEPT; i++) {
        if (conns->kept[i].fd == 0 || conns->kept[i].addr_len != to->addr_len ||
            memcmp(&conns->kept[i].addr, &to->addr, to->addr_len) != 0) {
            continue;
        }
        int fd = conns->kept[i].fd - 1;
        conns->kept[i].fd = 0;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (now - conns->kept[i].used_ms > IDLE_MS || poll(&p, 1, 0) != 0) {
            (void)close(fd);
            return -1;
        }
        return fd;
    }
    return -1;
}

static void keep(pv__copy_conns *conns, const pv__target *to, int fd) {
    size_t at = 0;
    for (size_t i = 0; i < PV__COPY_KEPT && conns->kept[at].fd != 0; i++) {
        if (conns->kept[i].fd == 0 || conns->kept[i].used_ms < conns->kept[at].used_ms) {
            at = i;
        }
    }
    if (conns->kept[at].fd != 0) {
        (void)close(conns->kept[at].fd - 1);
    }
    conns->kept[at].addr = to->addr;
    conns->kept[at].addr_len = to->addr_len;
    conns->kept[at].fd = fd + 1;
    conns->kept[at].used_ms = clock_ms();
}

void pv__copy_close(pv__copy_conns *conns) {
    for (size_t i = 0; i < PV__COPY_KEPT; i++) {
        if (conns->kept[i].fd != 0) {
            (void)close(conns->kept[i].fd - 1);
            conns->kept[i].fd = 0;
        }
    }
}

/* Head of the request and of its part; 0 if it does not fit. */
static size_t put_head(const pv__target *to, const pv__copy *what, const char *boundary, size_t tail_len, char *buf,
                       size_t cap) {
    char part[HEAD_CAP];
    char target[HEAD_CAP];
    struct pv__wr q = pv__writer(target, sizeof target);
    pv__put_text(&q, what->path);
    PV__PUT(&q, "?");
    if (what->fsync) {
        PV__PUT(&q, "fsync=true&");
    }
    PV__PUT(&q, "ts=");
    pv__put_u64(&q, what->last_modified_s);
    PV__PUT(&q, "&ttl=&type=replicate");
    char disposition[1024];
    size_t named = pv_content_disposition(0, what->name.p, what->name.n, disposition, sizeof disposition);
    struct pv__wr p = pv__writer(part, sizeof part);
    PV__PUT(&p, "--");
    pv__put(&p, boundary, (size_t)BOUNDARY_BYTES * 2);
    PV__PUT(&p, "\r\nContent-Disposition: form-data; ");
    static const char prefix[] = "inline; ";
    if (named > sizeof disposition || named < sizeof prefix || memcmp(disposition, prefix, sizeof prefix - 1) != 0) {
        return 0;
    }
    pv__put(&p, disposition + sizeof prefix - 1, named - (sizeof prefix - 1));
    PV__PUT(&p, "; name=file");
    if (what->mime.n != 0) {
        PV__PUT(&p, "\r\nContent-Type: ");
        pv__put_text(&p, what->mime);
    }
    PV__PUT(&p, "\r\nIdempotency-Key: http://");
    pv__put(&p, to->host, strlen(to->host));
    pv__put(&p, target, q.n);
    PV__PUT(&p, "\r\n\r\n");
    if (q.n > q.cap || p.n > p.cap) {
        return 0;
    }
    struct pv__wr w = pv__writer(buf, cap);
    PV__PUT(&w, "POST ");
    pv__put(&w, target, q.n);
    PV__PUT(&w, " HTTP/1.1\r\nHost: ");
    pv__put(&w, to->host, strlen(to->host));
    PV__PUT(&w, "\r\nContent-Type: multipart/form-data; boundary=");
    pv__put(&w, boundary, (size_t)BOUNDARY_BYTES * 2);
    PV__PUT(&w, "\r\nX-Amz-Request-Id: ");
    pv__put_text(&w, what->request_id);
    PV__PUT(&w, "\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: ");
    pv__put_u64(&w, (uint64_t)p.n + what->data_len + tail_len);
    PV__PUT(&w, "\r\n\r\n");
    pv__put(&w, part, p.n);
    return w.n <= w.cap ? w.n : 0;
}

static bool send_all(int fd, struct iovec *iov, size_t count, uint64_t due_ms) {
    size_t at = 0;
    while (at < count) {
        struct msghdr m = {.msg_iov = iov + at, .msg_iovlen = count - at};
        ssize_t n = sendmsg(fd, &m, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR || ((errno == EAGAIN || errno == EWOULDBLOCK) && wait_fd(fd, POLLOUT, due_ms))) {
                continue;
            }
            return false;
        }
        size_t left = (size_t)n;
        while (at < count && left >= iov[at].iov_len) {
            left -= iov[at].iov_len;
            at++;
        }
        if (at < count) {
            iov[at].iov_base = (char *)iov[at].iov_base + left;
            iov[at].iov_len -= left;
        }
    }
    return true;
}

static bool post(int fd, const pv__target *to, const pv__copy *what, uint64_t due_ms) {
    char head[2 * HEAD_CAP + 512];
    uint8_t random[BOUNDARY_BYTES];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) {
        return false;
    }
    char boundary[2 * BOUNDARY_BYTES];
    char tail[2 * BOUNDARY_BYTES + 8];
    for (size_t i = 0; i < sizeof random; i++) {
        boundary[2 * i] = pv__hex_lower[random[i] >> 4];
        boundary[2 * i + 1] = pv__hex_lower[random[i] & 15];
    }
    struct pv__wr t = pv__writer(tail, sizeof tail);
    PV__PUT(&t, "\r\n--");
    pv__put(&t, boundary, sizeof boundary);
    PV__PUT(&t, "--\r\n");
    size_t n = put_head(to, what, boundary, t.n, head, sizeof head);
    if (n == 0) {
        return false;
    }
    struct iovec iov[3] = {{head, n}, {(void *)(uintptr_t)what->data, what->data_len}, {tail, t.n}};
    return send_all(fd, iov, 3, due_ms);
}

/* The value of a header in the n bytes of a head, or an empty text. */
static pv_text field(const char *head, size_t n, const char *name) {
    size_t name_len = strlen(name);
    for (size_t at = 0; at < n;) {
        const char *end = memchr(head + at, '\n', n - at);
        size_t len = end != NULL ? (size_t)(end - (head + at)) : n - at;
        if (len > name_len && strncasecmp(head + at, name, name_len) == 0 && head[at + name_len] == ':') {
            const char *p = head + at + name_len + 1;
            size_t left = len - name_len - 1;
            while (left != 0 && (*p == ' ' || *p == '\t')) {
                p++;
                left--;
            }
            while (left != 0 && (p[left - 1] == '\r' || p[left - 1] == ' ' || p[left - 1] == '\t')) {
                left--;
            }
            return pv__text(p, left);
        }
        at += len + 1;
    }
    return pv__text(NULL, 0);
}

enum answered { REFUSED = -1, STORED = 0, NO_ANSWER = 1 };

/* Reads the answer. NO_ANSWER: the connection ended before a byte of it. *again: the connection can be used again. */
static enum answered read_answer(int fd, uint64_t due_ms, bool *again) {
    char buf[REPLY_CAP + 1];
    size_t n = 0;
    size_t head = 0;
    size_t want = 0;
    *again = false;
    for (;;) {
        if (head == 0) {
            buf[n] = '\0';
            const char *end = strstr(buf, "\r\n\r\n");
            if (end != NULL) {
                head = (size_t)(end - buf) + 4;
                /* Anything else than these, and than a body of announced length, is left to others to judge. */
                if (n < 12 || memcmp(buf, "HTTP/1.1 ", 9) != 0) {
                    return REFUSED;
                }
                if (memcmp(buf + 9, "204", 3) != 0) {
                    pv_text length = field(buf, head, "Content-Length");
                    if ((memcmp(buf + 9, "201", 3) != 0 && memcmp(buf + 9, "200", 3) != 0) || length.n == 0 ||
                        length.n > 5) {
                        return REFUSED;
                    }
                    for (size_t i = 0; i < length.n; i++) {
                        if (length.p[i] < '0' || length.p[i] > '9') {
                            return REFUSED;
                        }
                        want = want * 10 + (size_t)(length.p[i] - '0');
                    }
                }
                want += head;
            }
        }
        if (head != 0 && n >= want) {
            break;
        }
        if (n == REPLY_CAP || (head != 0 && want > REPLY_CAP)) {
            return REFUSED;
        }
        ssize_t got = recv(fd, buf + n, REPLY_CAP - n, 0);
        if (got < 0 && (errno == EINTR || ((errno == EAGAIN || errno == EWOULDBLOCK) && wait_fd(fd, POLLIN, due_ms)))) {
            continue;
        }
        if (got <= 0) {
            return n == 0 && (got == 0 || errno == ECONNRESET || errno == EPIPE) ? NO_ANSWER : REFUSED;
        }
        n += (size_t)got;
    }
    buf[n] = '\0';
    pv_text closing = field(buf, head, "Connection");
    *again = n == want && !(closing.n == 5 && strncasecmp(closing.p, "close", 5) == 0);
    if (want == head) {
        return memcmp(buf + 9, "204", 3) == 0 ? STORED : REFUSED;
    }
    bool object = buf[head] == '{' && buf[want - 1] == '}';
    buf[want] = '\0';
    return object && strlen(buf + head) == want - head && strstr(buf + head, "\"error\"") == NULL ? STORED : REFUSED;
}

int pv__copy_send(pv__copy_conns *conns, const pv__targets *to, const pv__copy *what) {
    int fds[PV__COPIES_MAX];
    bool kept[PV__COPIES_MAX];
    bool sent[PV__COPIES_MAX];
    uint64_t due_ms = clock_ms() + EXCHANGE_MS + (what->data_len >> 20) * 1000;
    int rc = 0;
    for (size_t i = 0; i < to->count; i++) { /* all have it before the first answer is waited for */
        fds[i] = take_kept(conns, &to->at[i]);
        kept[i] = fds[i] >= 0;
        fds[i] = kept[i] ? fds[i] : dial(&to->at[i]);
        sent[i] = fds[i] >= 0 && post(fds[i], &to->at[i], what, due_ms);
    }
    for (size_t i = 0; i < to->count; i++) {
        bool again = false;
        enum answered answer = sent[i] ? read_answer(fds[i], due_ms, &again) : NO_ANSWER;
        if (answer == NO_ANSWER && kept[i] && rc == 0) {
            (void)close(fds[i]);
            fds[i] = dial(&to->at[i]);
            if (fds[i] >= 0 && post(fds[i], &to->at[i], what, due_ms)) {
                answer = read_answer(fds[i], due_ms, &again);
            }
        }
        if (answer != STORED) {
            rc = PV_ESYS;
        }
        if (fds[i] >= 0 && again) {
            keep(conns, &to->at[i], fds[i]);
        } else if (fds[i] >= 0) {
            (void)close(fds[i]);
        }
    }
    return rc;
}
