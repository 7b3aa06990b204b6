/* pv_lane.c - the fast lane: epoll threads that serve plain needle requests, and hand everything else over.
 *
 * A connection belongs to one lane thread, or to the mailbox, or to the other lane; one that comes back lies with the thread's inbox
 * until the thread takes it into its list. It is in one of four states:
 *   reading   waits for bytes of a request: EPOLLIN. Idle ones hold no buffer
 *   pending   an I/O thread works for it (conn.op): no events but errors
 *   blocked   an answer waits for room in the socket (conn.out): EPOLLOUT
 *   ready     has input that was left for the next round, because others wait, too
 * A request is served only when all of it is there; until its first side effect it can be handed over untouched, with
 * all bytes from its first one on. What the volumes and pv_http.c say decides; this file adds nothing to the meaning.
 *
 * Locks: a thread's inbox, the job queues, the mailbox, the life cycle. Each is held for a few instructions, none with another.
 * Memory: bodies and needles above LARGE bytes count against the budget.
 */
#include "pv_lane_int.h"

#include "pv_copy_int.h"
#include "pv_http_int.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FIRST_READ 4096U /* bytes taken of a new request: what Go has not read when it refuses one causes a reset */
#define LARGE 65536U     /* larger bodies and needles count against the budget */
#define TEXT_CAP 16384U  /* of an answer: header block and the texts between ranges */
#define STATUS_ROOM 64U  /* in front of the block */
#define TAIL_CAP 1024U   /* the headers that every answer has */
#define PARTS_MAX 64U    /* stretches of a body; more are for the other lane */
#define SERVER_MAX 256U
#define WORK_CAP 4096U    /* scratch of pv_upload_parse */
#define SMALL_REPLY 2048U /* answers up to here have a Content-Length behind the Date */
#define PIPELINE_MAX 20U  /* requests of one connection before others have their turn */
#define ACCEPT_MAX 16U    /* connections per turn: the other threads want some, too */
#define DRAIN_ACCEPT_MAX 65536U
#define EVENTS 128
#define RECV_TURNS 16U /* reads of one body per turn */
#define ACCEPT_RETRY_MS 250U
#define INLINE_WRITE 262144U /* larger writes go to an I/O thread */
#define COPY_THREADS 16U     /* of writes that wait for replicas; started with the first route */
#define REQUEST_ID_CAP 32U
#define JOBS_MAX 1024U
#define LISTENERS_MAX 2U
#define THREADS_MAX 64U
#define SHED_BYTES 4096U /* read before a close, so that a line end left unread causes no reset */

typedef struct op op;
typedef struct lane_thread lane_thread;

typedef struct msg { /* a job has ended */
    struct msg *next;
    op *done;
} msg;

/* An answer the socket did not take at once. */
typedef struct out {
    struct iovec *iov;
    size_t count;
    size_t at;
    char *text;    /* what iov points to, besides data */
    uint8_t *data; /* of the needle */
    bool close;
} out;

typedef struct conn {
    struct conn *prev; /* all of the thread, least recently active first */
    struct conn *next;
    struct conn *ready_next;
    int fd;
    uint32_t mask;
    uint32_t flags; /* enum pv_lane_conn_flag */
    bool ready;
    bool dead; /* broken while pending */
    uint64_t active_ms;
    char *buf; /* input not served yet, or NULL */
    size_t len;
    size_t cap;
    size_t head_len; /* 0: the head is not complete */
    uint64_t need;   /* head and body */
    uint64_t charged;
    uint64_t started_ns; /* of the request */
    pv__head head;
    op *op;
    out *out;
} conn;

enum op_kind { OP_READ, OP_WRITE, OP_DELETE };

/* What is to be done with a volume for one request, on whichever thread, and what came of it. */
struct op {
    msg reply;
    op *next;
    conn *c;
    lane_thread *t;
    enum op_kind kind;
    bool replicate;
    bool fsync;
    bool locked; /* another change of the volume takes its time */
    int why;     /* -1, or enum pv_lane_reason */
    uint32_t vid;
    pv_vol *v;         /* a reference */
    pv_shards *shards; /* a reference, instead of v */
    bool sized;        /* of shards: the needle is known by row, and what it takes by charge */
    bool unplaced;     /* where the needle is has to be read from a disk: entry is not known yet */
    pv_idx_row row;
    uint64_t charge;    /* of the budget, for the connection to take over */
    uint64_t copy_ns;   /* what a write with copies took */
    pv__targets copies; /* count 0: none to be made */
    size_t request_id_len;
    char request_id[REQUEST_ID_CAP]; /* of a write with copies */
    uint64_t key;
    uint32_t cookie;
    uint32_t read_flags;
    pv_entry entry;
    pv_text ts;
    pv_text ttl;
    uint8_t volume_ttl_count;
    uint8_t volume_ttl_unit;
    pv_url url;
    pv_read rd;
    pv_needle n;
    pv_write_res res;
    int32_t deleted;
    pv_errinfo err;
    char work[WORK_CAP];
};

struct lane_thread {
    pv_lane *lane;
    pthread_t id;
    bool running;
    bool quiet; /* lane.life: nothing will be handed over any more */
    bool ended; /* lane.life */
    bool listening;
    bool reads_ended; /* the stop has begun, and nothing is read here any more */
    int epoll_fd;
    int wake_fd;
    pthread_mutex_t inbox_lock;
    msg *inbox;
    msg *inbox_last;
    conn *given; /* came back, and epoll knows of them; inbox_lock */
    conn *first;
    conn *last;
    conn *ready_first;
    conn *ready_last;
    size_t pending;
    uint64_t now_ns;
    uint64_t accept_at_ms; /* listening again, if not */
    pv_text request_id;    /* of the answer that is being made; empty: a new one */
    int64_t date_s;
    char date[40];
    size_t date_len;
    uint8_t random[512];
    size_t random_left;
    pv_lane_stats stats; /* written by this thread alone */
    op op;               /* of requests that are served at once */
    char scratch[FIRST_READ];
    char path[PV__HEAD_MAX];
    char text[STATUS_ROOM + TEXT_CAP];
    char tail[TAIL_CAP];
};

typedef struct listener {
    int fd;
    uint32_t flags;
} listener;

/* Jobs and the threads that do them, first come first served. Writes that wait for replicas have threads of their own, and those
 * that wait for a flush or another change, so that no read has to wait behind them; many share one flush in the engine. */
typedef struct job_queue {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    op *first;
    op *last;
    size_t count;
    bool end;
    pv_lane *lane;
    pthread_t *threads;
    uint32_t size;    /* threads there should be */
    uint32_t running; /* threads there are */
} job_queue;

struct pv_lane {
    pv_reg *registry;
    const pv_mime *mime;
    char server[SERVER_MAX];
    size_t server_len;
    uint64_t size_limit;
    uint64_t body_max;
    uint64_t budget;
    uint32_t idle_ms;
    uint32_t max_connections;
    bool fix_orientation;
    _Atomic uint32_t serve;
    _Atomic bool stopping;
    _Atomic bool cut;
    _Atomic uint64_t held;
    _Atomic uint32_t connections;
    _Atomic uint32_t next_thread;
    listener listeners[LISTENERS_MAX];
    size_t listener_count;
    lane_thread **threads;
    uint32_t thread_count;

    pthread_mutex_t life; /* quiet, ended, stopped */
    pthread_cond_t life_cond;
    bool started;
    bool stopped;
    uint64_t cut_count;

    job_queue io;
    job_queue sync;
    job_queue copy;
    pv__routes routes;

    pthread_mutex_t mail_lock;
    int mail_fd;
    pv_lane_item *mail; /* a ring */
    size_t mail_cap;
    size_t mail_at;
    size_t mail_count;
    bool mail_end;
};

enum outcome { DONE, BLOCKED, PENDING, GONE };

/* ------------------------------------------------------------------ counters, clocks, budget */

#define COUNT(t, field, n) __atomic_store_n(&(t)->stats.field, (t)->stats.field + (uint64_t)(n), __ATOMIC_RELAXED)

static uint64_t clock_ns(clockid_t clock) {
    struct timespec ts;
    (void)clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * UINT64_C(1000000000) + (uint64_t)ts.tv_nsec;
}

static uint64_t now_ms(const lane_thread *t) {
    return t->now_ns / 1000000;
}

static bool reserve(pv_lane *l, uint64_t n) {
    if (atomic_fetch_add(&l->held, n) + n > l->budget) {
        atomic_fetch_sub(&l->held, n);
        return false;
    }
    return true;
}

static void uncharge(pv_lane *l, conn *c) {
    if (c->charged != 0) {
        atomic_fetch_sub(&l->held, c->charged);
        c->charged = 0;
    }
}

static const uint16_t statuses[PV_LANE_STATUSES] = {200, 201, 202, 204, 206, 304, 416};

static size_t latency_bucket(uint64_t ns) {
    size_t bucket = 0;
    for (uint64_t top = 100000; bucket < PV_LANE_BUCKETS - 1 && ns > top; top *= 2) {
        bucket++;
    }
    return bucket;
}

static void record(lane_thread *t, const conn *c, int status) {
    size_t slot = 0;
    while (slot < PV_LANE_STATUSES - 1 && statuses[slot] != status) {
        slot++;
    }
    size_t method = (size_t)(c->head.method - 1) + ((c->flags & PV_LANE_PUBLIC) != 0 ? PV_LANE_METHODS : 0);
    t->now_ns = clock_ns(CLOCK_MONOTONIC);
    uint64_t ns = t->now_ns - c->started_ns;
    COUNT(t, requests[method * PV_LANE_STATUSES + slot], 1);
    COUNT(t, nanoseconds[method], ns);
    COUNT(t, latency[method * PV_LANE_BUCKETS + latency_bucket(ns)], 1);
}

/* Random bytes; never fails (before the pool is seeded the call waits). */
static void random_bytes(lane_thread *t, uint8_t *to, size_t n) {
    if (t->random_left < n) {
        size_t got = 0;
        while (got < sizeof t->random) {
            ssize_t rc = getrandom(t->random + got, sizeof t->random - got, 0);
            if (rc > 0) {
                got += (size_t)rc;
            } else if (errno != EINTR) {
                abort();
            }
        }
        t->random_left = sizeof t->random;
    }
    memcpy(to, t->random + sizeof t->random - t->random_left, n);
    t->random_left -= n;
}

/* ------------------------------------------------------------------ connections */

static void list_remove(lane_thread *t, conn *c) {
    *(c->prev != NULL ? &c->prev->next : &t->first) = c->next;
    *(c->next != NULL ? &c->next->prev : &t->last) = c->prev;
    c->prev = c->next = NULL;
}

static void list_append(lane_thread *t, conn *c) {
    c->prev = t->last;
    c->next = NULL;
    *(t->last != NULL ? &t->last->next : &t->first) = c;
    t->last = c;
}

static void touch(lane_thread *t, conn *c) {
    c->active_ms = now_ms(t);
    if (t->last != c) {
        list_remove(t, c);
        list_append(t, c);
    }
}

static void set_mask(lane_thread *t, conn *c, uint32_t mask) {
    if (c->mask != mask && !c->dead) {
        c->mask = mask;
        struct epoll_event ev = {.events = mask, .data.ptr = c};
        pv__must(epoll_ctl(t->epoll_fd, EPOLL_CTL_MOD, c->fd, &ev));
    }
}

static void out_free(out *o) {
    if (o != NULL) {
        pv_buf_free(o->data);
        pv__free(o->text);
        pv__free(o->iov);
        pv__free(o);
    }
}

/* Ends this thread's part in a connection; the descriptor stays open. */
static void forget(lane_thread *t, conn *c) {
    if (c->ready) {
        conn **at = &t->ready_first;
        conn *before = NULL;
        while (*at != c) {
            before = *at;
            at = &before->ready_next;
        }
        *at = c->ready_next;
        if (t->ready_last == c) {
            t->ready_last = before;
        }
    }
    list_remove(t, c);
    uncharge(t->lane, c);
    out_free(c->out);
    pv__free(c->buf);
    pv__free(c);
    atomic_fetch_sub(&t->lane->connections, 1);
}

static void close_conn(lane_thread *t, conn *c) {
    int fd = c->fd;
    forget(t, c);
    (void)close(fd); /* takes it out of epoll as well */
}

static const char busy_reply[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\n"
                                 "Connection: close\r\n\r\n503 Service Unavailable";

static bool peer_of(int fd, pv_lane_item *item) {
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    memset(&addr, 0, sizeof addr);
    if (getpeername(fd, (struct sockaddr *)&addr, &len) < 0) {
        return false;
    }
    if (addr.ss_family == AF_INET6) {
        struct sockaddr_in6 in6;
        memcpy(&in6, &addr, sizeof in6);
        item->port = ntohs(in6.sin6_port);
        return inet_ntop(AF_INET6, &in6.sin6_addr, item->host, sizeof item->host) != NULL;
    }
    if (addr.ss_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, &addr, sizeof in);
        item->port = ntohs(in.sin_port);
        return inet_ntop(AF_INET, &in.sin_addr, item->host, sizeof item->host) != NULL;
    }
    memcpy(item->host, "unix", 5); /* tests drive the lane over socket pairs */
    return true;
}

static void signal_fd(int fd) {
    uint64_t one = 1;
    (void)!write(fd, &one, sizeof one);
}

/* The connection and the n bytes at p, which begin with its next request, go to the other lane. c is gone afterwards. */
static enum outcome hand_over(lane_thread *t, conn *c, char *p, size_t n, int why) {
    pv_lane *l = t->lane;
    pv_lane_item item = {.fd = c->fd, .flags = c->flags, .size = n, .reason = (uint32_t)why};
    if (c->dead || !peer_of(c->fd, &item)) {
        close_conn(t, c);
        return GONE;
    }
    if (n != 0 && p == c->buf) {
        item.data = (uint8_t *)c->buf;
        c->buf = NULL;
    } else if (n != 0) {
        item.data = pv__malloc(n);
        if (item.data == NULL) {
            close_conn(t, c);
            return GONE;
        }
        memcpy(item.data, p, n);
    }
    item.charged = c->charged;
    c->charged = 0;
    (void)epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    forget(t, c);
    pv__mutex_lock(&l->mail_lock);
    bool full = l->mail_count == l->mail_cap;
    bool first = l->mail_count == 0;
    if (!full) {
        l->mail[(l->mail_at + l->mail_count) % l->mail_cap] = item;
        l->mail_count++;
    }
    pv__mutex_unlock(&l->mail_lock);
    if (first) {
        signal_fd(l->mail_fd);
    }
    if (full) {
        COUNT(t, mailbox_full, 1);
        (void)!send(item.fd, busy_reply, sizeof busy_reply - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        (void)close(item.fd);
        pv_lane_item_free(l, &item);
    } else {
        COUNT(t, handed_over[why], 1);
    }
    return GONE;
}

/* ------------------------------------------------------------------ requests: may they be served here */

static pv_text span_text(const char *p, pv__span s) {
    return pv__text(s.n != 0 ? p + s.at : NULL, s.n);
}

static bool is_read(const conn *c) {
    return c->head.method == PV__M_GET || c->head.method == PV__M_HEAD;
}

static bool is_upload(const conn *c) {
    return c->head.method == PV__M_POST || c->head.method == PV__M_PUT;
}

static bool has_field(const conn *c, enum pv__field field) {
    return (c->head.seen & (UINT32_C(1) << field)) != 0;
}

/* The parameters that are served: readDeleted=true of reads; type=replicate of writes and deletes; ts, ttl and fsync=true
 * of writes. Each once. */
static bool take_query(const conn *c, pv_text query, op *o) {
    unsigned seen = 0;
    size_t at = 0;
    while (at < query.n) {
        const char *p = query.p + at;
        const char *amp = memchr(p, '&', query.n - at);
        size_t n = amp != NULL ? (size_t)(amp - p) : query.n - at;
        at += n + 1;
        if (n == 0) {
            continue;
        }
        const char *equals = memchr(p, '=', n);
        pv_text name = pv__text(p, equals != NULL ? (size_t)(equals - p) : n);
        pv_text value = equals != NULL ? pv__text(equals + 1, n - name.n - 1) : pv__text(NULL, 0);
        unsigned bit;
        if (is_read(c)) {
            if (!pv__eq(name, PV__LIT("readDeleted")) || !pv__eq(value, PV__LIT("true"))) {
                return false;
            }
            o->read_flags |= PV_READ_DELETED;
            bit = 1;
        } else if (pv__eq(name, PV__LIT("type")) && pv__eq(value, PV__LIT("replicate"))) {
            o->replicate = true;
            bit = 2;
        } else if (is_upload(c) && pv__eq(name, PV__LIT("ts"))) {
            o->ts = value;
            bit = 4;
        } else if (is_upload(c) && pv__eq(name, PV__LIT("ttl"))) {
            o->ttl = value;
            bit = 8;
        } else if (is_upload(c) && pv__eq(name, PV__LIT("fsync")) && pv__eq(value, PV__LIT("true"))) {
            o->fsync = true;
            bit = 16;
        } else {
            return false;
        }
        if ((seen & bit) != 0) {
            return false;
        }
        seen |= bit;
    }
    return true;
}

/* True if a path can be sent on as it came. */
static bool is_literal_path(pv_text path) {
    for (size_t i = 0; i < path.n; i++) {
        char ch = path.p[i];
        if (!(ch >= 'a' && ch <= 'z') && !(ch >= 'A' && ch <= 'Z') && !(ch >= '0' && ch <= '9') && ch != '/' &&
            ch != ',' && ch != '.' && ch != '-' && ch != '_') {
            return false;
        }
    }
    return path.n < 1024;
}

static void let_go(op *o) {
    pv_vol_unref(o->v);
    pv_shards_unref(o->shards);
    o->v = NULL;
    o->shards = NULL;
}

/* Looks at a complete head. -1: it is served here, o->v or o->shards is a reference; else the reason why not. */
static int admit(lane_thread *t, conn *c, const char *p, op *o) {
    pv_lane *l = t->lane;
    uint32_t serve = atomic_load_explicit(&l->serve, memory_order_acquire);
    if (is_read(c) ? (serve & PV_LANE_READS) == 0 : (serve & PV_LANE_WRITES) == 0 || (c->flags & PV_LANE_PUBLIC) != 0) {
        return PV_LANE_WHY_OFF;
    }
    pv_text type = span_text(p, c->head.fields[PV__F_CONTENT_TYPE]);
    if (is_upload(c)) {
        pv_text message;
        if (!has_field(c, PV__F_CONTENT_LENGTH) || pv_form_check(type.p, type.n, &message) != 0) {
            return PV_LANE_WHY_UPLOAD;
        }
    } else if (c->head.content_length != 0 || has_field(c, PV__F_CONTENT_TYPE)) {
        return PV_LANE_WHY_HEAD;
    }
    o->kind = is_read(c) ? OP_READ : is_upload(c) ? OP_WRITE : OP_DELETE;
    o->why = -1;
    o->replicate = o->fsync = o->unplaced = false;
    o->read_flags = 0;
    o->ts = o->ttl = pv__text(NULL, 0);
    if (!take_query(c, span_text(p, c->head.query), o)) {
        return PV_LANE_WHY_QUERY;
    }
    if (c->head.content_length > l->body_max) {
        return PV_LANE_WHY_SIZE;
    }
    pv_url *url = &o->url;
    uint32_t vid;
    if (pv_url_parse(p + c->head.path.at, c->head.path.n, t->path, sizeof t->path, url, &o->err) < 0 ||
        url->kind != PV_URL_NEEDLE || url->unclean || pv_vid_parse(url->vid.p, url->vid.n, &vid, NULL) < 0) {
        return PV_LANE_WHY_PATH;
    }
    pv_text fid = url->fid;
    if (o->kind == OP_WRITE) {
        pv_url_write_fid(url->path.p, url->path.n, &fid);
    }
    if (pv_fid_parse(fid.p, fid.n, &o->key, &o->cookie, NULL) < 0) {
        return PV_LANE_WHY_PATH;
    }
    uint32_t flags;
    o->sized = false;
    o->charge = 0;
    o->v = pv_reg_acquire_as(l->registry, vid, &flags);
    o->shards = o->v == NULL && o->kind == OP_READ ? pv_reg_acquire_shards(l->registry, vid) : NULL;
    o->vid = vid;
    o->copies.count = 0;
    if (o->shards != NULL) {
        return -1;
    }
    if (o->v == NULL) {
        return PV_LANE_WHY_VOLUME;
    }
    o->volume_ttl_count = (uint8_t)(flags >> PV_REG_TTL_COUNT_SHIFT);
    o->volume_ttl_unit = (uint8_t)(flags >> PV_REG_TTL_UNIT_SHIFT);
    if (o->kind != OP_READ && (flags & PV_REG_SINGLE) == 0 && !o->replicate &&
        (o->kind != OP_WRITE || c->head.credentials || !is_literal_path(span_text(p, c->head.path)) ||
         !pv__routes_find(&l->routes, vid, (flags >> PV_REG_COPIES_SHIFT) & 0xff, now_ms(t), &o->copies))) {
        o->copies.count = 0;
        let_go(o);
        return PV_LANE_WHY_VOLUME;
    }
    return -1;
}

/* ------------------------------------------------------------------ answers */

static enum outcome conclude(lane_thread *t, conn *c, bool closing) {
    uncharge(t->lane, c);
    touch(t, c);
    if (closing || c->dead || t->reads_ended) {
        char shed[SHED_BYTES];
        (void)!recv(c->fd, shed, sizeof shed, MSG_DONTWAIT);
        close_conn(t, c);
        return GONE;
    }
    return DONE;
}

/* Sends what the socket takes. *sent is raised by that; false: the connection is broken. */
static bool send_some(lane_thread *t, conn *c, struct iovec *iov, size_t count, size_t *sent) {
    struct msghdr mh = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t n;
    do {
        n = sendmsg(c->fd, &mh, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EAGAIN || errno == EWOULDBLOCK;
    }
    COUNT(t, sent_bytes, n);
    *sent += (size_t)n;
    return true;
}

/* Drops the first n bytes of an array of pieces; the index of the first that is left. */
static size_t skip(struct iovec *iov, size_t count, size_t n) {
    size_t at = 0;
    while (at < count && n >= iov[at].iov_len) {
        n -= iov[at].iov_len;
        at++;
    }
    if (n != 0) {
        iov[at].iov_base = (char *)iov[at].iov_base + n;
        iov[at].iov_len -= n;
    }
    return at;
}

/* Keeps what was not sent. Takes *data. The texts are copied; they are what does not lie in the data. */
static bool keep(conn *c, const struct iovec *iov, size_t count, uint8_t **data, size_t data_len, bool closing) {
    size_t text = 0;
    const char *low = (const char *)*data;
    for (size_t i = 0; i < count; i++) {
        const char *p = iov[i].iov_base;
        bool in_data = low != NULL && p >= low && p < low + data_len;
        text += in_data ? 0 : iov[i].iov_len;
    }
    out *o = pv__calloc(1, sizeof *o);
    struct iovec *copy = pv__calloc(count, sizeof *copy);
    char *to = pv__malloc(text + 1);
    if (o == NULL || copy == NULL || to == NULL) {
        pv__free(o);
        pv__free(copy);
        pv__free(to);
        return false;
    }
    *o = (out){.iov = copy, .count = count, .text = to, .data = *data, .close = closing};
    for (size_t i = 0; i < count; i++) {
        const char *p = iov[i].iov_base;
        copy[i] = iov[i];
        if (low == NULL || p < low || p >= low + data_len) {
            memcpy(to, p, iov[i].iov_len);
            copy[i].iov_base = to;
            to += iov[i].iov_len;
        }
    }
    *data = NULL;
    c->out = o;
    return true;
}

static const char *reason_of(int status) {
    switch (status) {
    case 200:
        return "OK";
    case 201:
        return "Created";
    case 202:
        return "Accepted";
    case 204:
        return "No Content";
    case 206:
        return "Partial Content";
    case 304:
        return "Not Modified";
    default:
        return "Requested Range Not Satisfiable";
    }
}

/* The lines that end every head. length: of the body, where the block does not tell; -1: not told. */
static size_t put_tail(lane_thread *t, const conn *c, int64_t length, bool closing) {
    const pv_lane *l = t->lane;
    struct pv__wr w = pv__writer(t->tail, sizeof t->tail);
    pv__put_text(&w, PV__LIT("Server: "));
    pv__put(&w, l->server, l->server_len);
    pv__put_text(&w, PV__LIT("\r\nX-Amz-Request-Id: "));
    uint64_t wall_ns = clock_ns(CLOCK_REALTIME);
    if (t->request_id.n != 0) {
        pv__put_text(&w, t->request_id);
    } else {
        uint8_t random[4];
        random_bytes(t, random, sizeof random);
        w.n += pv_request_id(wall_ns, pv__get_be32(random), t->tail + w.n, sizeof t->tail - w.n);
    }
    if (c->head.fields[PV__F_ORIGIN].n != 0) {
        pv__put_text(&w, PV__LIT("\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true"));
    }
    int64_t wall_s = (int64_t)(wall_ns / UINT64_C(1000000000));
    if (wall_s != t->date_s) {
        t->date_len = pv_http_date(wall_s, t->date, sizeof t->date);
        t->date_s = wall_s;
    }
    pv__put_text(&w, PV__LIT("\r\nDate: "));
    pv__put(&w, t->date, t->date_len);
    if (length >= 0) {
        char digits[24];
        int n = snprintf(digits, sizeof digits, "%lld", (long long)length);
        pv__put_text(&w, PV__LIT("\r\nContent-Length: "));
        pv__put(&w, digits, (size_t)n);
    }
    if (closing) {
        pv__put_text(&w, PV__LIT("\r\nConnection: close"));
    }
    pv__put_text(&w, PV__LIT("\r\n\r\n"));
    return w.n; /* the server's name is bounded, so this fits */
}

/* Sends an answer whose block (block_len bytes) stands in t->text behind STATUS_ROOM. iov has room for two pieces in front
 * of its count pieces of body. Takes *data, which the body's pieces may point into. */
static enum outcome answer(lane_thread *t, conn *c, int status, size_t block_len, int64_t length, struct iovec *iov,
                           size_t count, uint8_t *data, size_t data_len) {
    bool closing = c->head.close || atomic_load_explicit(&t->lane->stopping, memory_order_relaxed);
    char line[STATUS_ROOM];
    int n = snprintf(line, sizeof line, "HTTP/1.1 %d %s\r\n", status, reason_of(status));
    char *begin = t->text + STATUS_ROOM - n;
    memcpy(begin, line, (size_t)n);
    iov[0] = (struct iovec){begin, (size_t)n + block_len};
    iov[1] = (struct iovec){t->tail, put_tail(t, c, length, closing)};
    count += 2;
    record(t, c, status);
    c->flags |= PV_LANE_SERVED;
    c->flags &= ~(uint32_t)PV_LANE_LENIENT;
    c->flags |= c->head.method == PV__M_POST ? PV_LANE_LENIENT : 0;
    size_t total = 0;
    for (size_t i = 0; i < count; i++) {
        total += iov[i].iov_len;
    }
    size_t sent = 0;
    bool ok = !c->dead && send_some(t, c, iov, count, &sent);
    enum outcome result;
    if (ok && sent == total) {
        result = conclude(t, c, closing);
    } else {
        size_t at = ok ? skip(iov, count, sent) : count;
        if (ok && keep(c, iov + at, count - at, &data, data_len, closing)) {
            touch(t, c);
            set_mask(t, c, EPOLLOUT);
            result = BLOCKED;
        } else {
            close_conn(t, c);
            result = GONE;
        }
    }
    pv_buf_free(data);
    return result;
}

/* ------------------------------------------------------------------ work on volumes: any thread */

static bool would_block(int rc, const pv_errinfo *err) {
    return rc == PV_ESYS && (err->sys_errno == EAGAIN || err->sys_errno == EOPNOTSUPP);
}

/* Finds and reads a needle of shards. 1: it would wait, or take its time. */
static int work_shards(op *o, bool soon) {
    pv_lane *l = o->t->lane;
    uint32_t how = soon ? PV_READ_CACHED : 0;
    int rc = o->sized ? 0 : pv_shards_find(o->shards, o->key, how, &o->row, &o->err);
    if (rc == 0 && !o->sized) {
        o->sized = true;
        if (o->row.size == 0) {
            rc = PV_ENOTFOUND;
        } else if ((uint64_t)o->row.size > l->body_max) {
            o->why = PV_LANE_WHY_SIZE;
        } else if ((uint64_t)o->row.size > LARGE) {
            if (reserve(l, (uint64_t)o->row.size)) {
                o->charge = (uint64_t)o->row.size;
            } else {
                o->why = PV_LANE_WHY_SIZE;
            }
        }
    }
    if (rc == 0 && o->why < 0) {
        rc = pv_shards_read(o->shards, &o->row, how, &o->rd, &o->err);
    }
    if (soon && would_block(rc, &o->err)) {
        return 1;
    }
    if (rc < 0) {
        o->why = PV_LANE_WHY_NEEDLE;
    } else if (o->why < 0 && (o->rd.n.cookie != o->cookie || (o->rd.n.flags & (PV_F_MANIFEST | PV_F_PAIRS)) != 0)) {
        o->why = PV_LANE_WHY_NEEDLE;
        pv_read_free(&o->rd);
    }
    return 0;
}

/* Whether an entry says that there is something to be read, or to be deleted. */
static bool is_there(const op *o, int rc) {
    return rc == 0 && o->entry.size != 0 && (o->entry.size > 0 || (o->read_flags & PV_READ_DELETED) != 0);
}

/* Finds out where a needle is, waiting for the disk. */
static void place(op *o) {
    pv_lane *l = o->t->lane;
    int rc = pv_vol_lookup(o->v, o->key, &o->entry);
    uint64_t size = (uint64_t)(o->entry.size < 0 ? -(int64_t)o->entry.size : o->entry.size);
    if (!is_there(o, rc)) {
        o->why = PV_LANE_WHY_NEEDLE;
    } else if (size > l->body_max || (size > LARGE && !reserve(l, size))) {
        o->why = PV_LANE_WHY_SIZE;
    } else if (size > LARGE) {
        o->charge = size;
    }
}

/* Does the work of o. 1: it would wait for the disk or another change, and soon asks not to. */
static int work(op *o, bool soon) {
    if (o->shards != NULL) {
        return work_shards(o, soon);
    }
    if (o->unplaced) {
        place(o);
        if (o->why >= 0) {
            return 0;
        }
    }
    uint32_t how = PV_READ_ENTRY | o->read_flags | (soon ? PV_READ_CACHED : 0);
    int rc;
    if (o->kind == OP_WRITE) {
        uint32_t flags = PV_WRITE_CHECK_COOKIE | (o->fsync ? PV_WRITE_FSYNC : 0) | (soon ? PV_WRITE_NOWAIT : 0);
        rc = pv_vol_write(o->v, &o->n, flags, NULL, &o->res, &o->err);
        if (soon && would_block(rc, &o->err)) {
            return 1;
        }
        o->why = rc < 0 ? PV_LANE_WHY_WRITE : -1;
        return 0;
    }
    rc = pv_vol_read(o->v, o->key, how, &o->entry, &o->rd, &o->err);
    if (soon && would_block(rc, &o->err)) {
        return 1;
    }
    if (rc < 0) {
        o->why = PV_LANE_WHY_NEEDLE;
        return 0;
    }
    const pv_needle *n = &o->rd.n;
    if (o->rd.empty || n->cookie != o->cookie || (n->flags & (PV_F_MANIFEST | PV_F_PAIRS)) != 0) {
        o->why = PV_LANE_WHY_NEEDLE;
    } else if (o->kind == OP_DELETE) {
        rc = pv_vol_delete(o->v, o->key, o->cookie, n->checksum, soon ? PV_WRITE_NOWAIT : 0, NULL, &o->deleted, &o->res,
                           &o->err);
        if (soon && would_block(rc, &o->err)) {
            pv_read_free(&o->rd);
            return 1;
        }
        o->why = rc < 0 ? PV_LANE_WHY_WRITE : -1;
    }
    if (o->why >= 0 || o->kind == OP_DELETE) {
        pv_read_free(&o->rd);
    }
    return 0;
}

static bool expired(const pv_needle *n) {
    static const uint64_t minutes[] = {0, 1, 60, 1440, 10080, 43200, 525600};
    if ((n->flags & PV_F_TTL) == 0 || (n->flags & PV_F_MTIME) == 0 || n->ttl_unit >= PV__ARRAY_LEN(minutes)) {
        return false;
    }
    uint64_t life_ns = n->ttl_count * minutes[n->ttl_unit] * UINT64_C(60000000000);
    return life_ns != 0 && clock_ns(CLOCK_REALTIME) >= n->append_at_ns + life_ns;
}

/* Whether a stored text may stand in a header as it is. */
static bool plain(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (p[i] < 0x20 || p[i] == 0x7f) {
            return false;
        }
    }
    return true;
}

/* ------------------------------------------------------------------ the three kinds of requests: lane thread */

/* o has been read. p: the input, whose first request it is; avail: all of the input. */
static enum outcome answer_read(lane_thread *t, conn *c, char *p, size_t avail, op *o) {
    const pv_needle *n = &o->rd.n;
    int why = PV_LANE_WHY_NEEDLE;
    uint8_t random30[30];
    pv_body_part parts[PARTS_MAX];
    pv_plan plan;
    pv_get_req req = {
        .filename = o->url.filename,
        .accept_encoding = span_text(p, c->head.fields[PV__F_ACCEPT_ENCODING]),
        .range = span_text(p, c->head.fields[PV__F_RANGE]),
        .if_modified_since = span_text(p, c->head.fields[PV__F_IF_MODIFIED_SINCE]),
        .if_none_match = span_text(p, c->head.fields[PV__F_IF_NONE_MATCH]),
        .random30 = random30,
        .flags = c->head.method == PV__M_HEAD ? PV_GET_HEAD : 0,
    };
    pv_get_needle found = {
        .name = pv__text((const char *)n->name, n->name_size),
        .mime = pv__text((const char *)n->mime, n->mime_size),
        .data = n->data,
        .data_len = n->data_size,
        .last_modified_s = n->last_modified_s,
        .checksum = n->checksum,
        .flags = n->flags,
    };
    if (expired(n) || !plain(n->name, n->name_size) || !plain(n->mime, n->mime_size)) {
        goto elsewhere;
    }
    if (req.range.n != 0 && memchr(req.range.p, ',', req.range.n) != NULL) {
        random_bytes(t, random30, sizeof random30);
    }
    char *block = t->text + STATUS_ROOM;
    int rc = pv_get_plan(&req, &found, t->lane->mime, block, TEXT_CAP, parts, PARTS_MAX, &plan, &o->err);
    why = PV_LANE_WHY_ANSWER;
    if (rc != PV_GET_DONE || plan.flags != 0) {
        goto elsewhere;
    }
    bool length_told = memmem(block, plan.head_len, "\r\nContent-Length: ", 18) != NULL;
    if (length_told == (plan.status == 304)) {
        goto elsewhere;
    }
    struct iovec iov[2 + 2 * PARTS_MAX];
    size_t count = 2;
    for (size_t i = 0; i < plan.parts; i++) {
        if (parts[i].text_len != 0) {
            iov[count++] = (struct iovec){block + parts[i].text_offset, parts[i].text_len};
        }
        if (parts[i].data_len != 0) {
            iov[count++] = (struct iovec){(uint8_t *)(uintptr_t)(n->data + parts[i].data_offset), parts[i].data_len};
        }
    }
    uint8_t *data = o->rd.buf;
    o->rd.buf = NULL;
    return answer(t, c, plan.status, plan.head_len, -1, iov, count - 2, data, o->rd.buf_len);
elsewhere:
    pv_read_free(&o->rd);
    return hand_over(t, c, p, avail, why);
}

static enum outcome answer_write(lane_thread *t, conn *c, op *o) {
    if (o->copies.count != 0) {
        COUNT(t, copied, 1);
        COUNT(t, copies, o->copies.count);
        COUNT(t, copy_nanoseconds, o->copy_ns);
        COUNT(t, copy_latency[latency_bucket(o->copy_ns)], 1);
        t->request_id = pv__text(o->request_id, o->request_id_len);
    }
    struct pv__wr w = pv__writer(t->text + STATUS_ROOM, TEXT_CAP);
    pv__put_text(&w, PV__LIT("Etag: "));
    w.n += pv_etag(o->res.checksum, w.p + w.n, w.cap - w.n);
    pv__put_text(&w, PV__LIT("\r\nContent-Md5: \r\n"));
    struct iovec iov[3];
    if (o->res.unchanged) {
        return answer(t, c, 204, w.n, -1, iov, 0, NULL, 0);
    }
    pv__put_text(&w, PV__LIT("Content-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"));
    char *body = w.p + w.n;
    size_t n = pv_write_reply(pv__text((const char *)o->n.name, o->n.name_size), o->n.data_size, o->res.checksum,
                              pv__text((const char *)o->n.mime, o->n.mime_size), pv__text(NULL, 0), body, w.cap - w.n);
    iov[2] = (struct iovec){body, n};
    return answer(t, c, 201, w.n, (int64_t)n, iov, 1, NULL, 0);
}

static enum outcome answer_delete(lane_thread *t, conn *c, op *o) {
    struct pv__wr w = pv__writer(t->text + STATUS_ROOM, TEXT_CAP);
    pv__put_text(&w, PV__LIT("Content-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"));
    char *body = w.p + w.n;
    int n = snprintf(body, w.cap - w.n, "{\"size\":%d}", o->rd.n.size);
    struct iovec iov[3];
    iov[2] = (struct iovec){body, (size_t)n};
    return answer(t, c, 202, w.n, n, iov, 1, NULL, 0);
}

/* What follows when the work of a request is done. */
static enum outcome worked(lane_thread *t, conn *c, char *p, size_t avail, op *o) {
    if (o->why >= 0) {
        return hand_over(t, c, p, avail, o->why);
    }
    enum outcome result;
    switch (o->kind) {
    case OP_READ:
        return answer_read(t, c, p, avail, o);
    case OP_WRITE:
        result = answer_write(t, c, o);
        t->request_id = pv__text(NULL, 0);
        return result;
    default:
        return answer_delete(t, c, o);
    }
}

static bool ends_like_jpeg(pv_text name) {
    char low[5] = {0};
    if (name.n < 4) {
        return false;
    }
    size_t n = name.n < 5 ? name.n : 5;
    for (size_t i = 0; i < n; i++) {
        char ch = name.p[name.n - n + i];
        low[i] = ch >= 'A' && ch <= 'Z' ? (char)(ch + 32) : ch;
    }
    return (n == 5 && memcmp(low, ".jpeg", 5) == 0) || memcmp(low + n - 4, ".jpg", 4) == 0;
}

/* Plain text that can stand in a header. */
static bool is_line(pv_text text) {
    for (size_t i = 0; i < text.n; i++) {
        if (text.p[i] < ' ' || text.p[i] > '~') {
            return false;
        }
    }
    return text.n < 256;
}

/* Makes the needle of an upload. Its texts point into p and o->work. */
static bool make_needle(const lane_thread *t, const conn *c, const char *p, op *o) {
    static const char *const methods[] = {"", "GET", "HEAD", "PUT", "POST", "DELETE"};
    const pv_lane *l = t->lane;
    pv_upload_req req = {
        .method = pv__cstr(methods[c->head.method]),
        .content_type = span_text(p, c->head.fields[PV__F_CONTENT_TYPE]),
        .content_disposition = span_text(p, c->head.fields[PV__F_CONTENT_DISPOSITION]),
        .content_encoding = span_text(p, c->head.fields[PV__F_CONTENT_ENCODING]),
        .path = o->url.path,
        .body = (const uint8_t *)p + c->head_len,
        .body_len = (size_t)c->head.content_length,
        .size_limit = l->size_limit,
        .mime = l->mime,
    };
    pv_upload up;
    if (pv_upload_parse(&req, o->work, sizeof o->work, &up, &o->err) != 0 || up.md5.n != 0 || up.is_gzipped ||
        up.quoted || up.data_len > UINT32_MAX) {
        return false;
    }
    if (!o->replicate && pv_should_compress(up.name, up.mime, up.data, up.data_len)) {
        return false;
    }
    if (l->fix_orientation && (pv__eq(up.mime, PV__LIT("image/jpeg")) || ends_like_jpeg(up.name))) {
        return false;
    }
    pv_needle *n = &o->n;
    memset(n, 0, sizeof *n);
    n->id = o->key;
    n->cookie = o->cookie;
    n->flags = PV_F_MTIME;
    n->data = up.data;
    n->data_size = (uint32_t)up.data_len;
    if (up.name.n < 256) {
        n->flags |= PV_F_NAME;
        n->name = (const uint8_t *)up.name.p;
        n->name_size = (uint8_t)up.name.n;
    }
    if (up.mime.n < 256) {
        n->flags |= PV_F_MIME;
        n->mime = (const uint8_t *)up.mime.p;
        n->mime_size = (uint8_t)up.mime.n;
    }
    if (pv_ttl_parse(o->ttl.p, o->ttl.n, &n->ttl_count, &n->ttl_unit) == 0) {
        n->ttl_count = o->volume_ttl_count;
        n->ttl_unit = o->volume_ttl_unit;
    }
    if (n->ttl_count != 0 || n->ttl_unit != 0) {
        n->flags |= PV_F_TTL;
    }
    n->last_modified_s = pv_ts_parse(o->ts.p, o->ts.n);
    if (n->last_modified_s == 0) {
        n->last_modified_s = clock_ns(CLOCK_REALTIME) / UINT64_C(1000000000);
    }
    if (o->copies.count != 0 && ((n->flags & PV_F_TTL) != 0 || !is_line(up.name) || !is_line(up.mime))) {
        return false; /* the other lane knows how to tell replicas of these */
    }
    /* The answer must fit into what is sent with a length: an escaped byte takes at most six. */
    return ((size_t)n->name_size + n->mime_size) * 6 + 128 <= SMALL_REPLY;
}

/* ------------------------------------------------------------------ input */

/* Keeps the n bytes at p as the connection's input, with room for `want` in all. False: no memory, c is gone. */
static bool stash(lane_thread *t, conn *c, const char *p, size_t n, size_t want) {
    if (n == 0) {
        pv__free(c->buf);
        c->buf = NULL;
        c->len = c->cap = 0;
        return true;
    }
    if (want < n) {
        want = n;
    }
    bool inside = c->buf != NULL && p >= c->buf && p < c->buf + c->cap;
    if (inside && p != c->buf) {
        memmove(c->buf, p, n);
    }
    if (!inside || want > c->cap) {
        char *fresh = pv__realloc(inside ? c->buf : NULL, want, 1);
        if (fresh == NULL) {
            close_conn(t, c);
            return false;
        }
        if (!inside) {
            memcpy(fresh, p, n);
            pv__free(c->buf);
        }
        c->buf = fresh;
        c->cap = want;
    }
    c->len = n;
    return true;
}

/* Gives work to an I/O thread. The input is stashed already. False: the queue is full. */
static bool queue_job(lane_thread *t, conn *c, op *o) {
    job_queue *q = o->copies.count != 0 ? &t->lane->copy : o->fsync || o->locked ? &t->lane->sync : &t->lane->io;
    o->c = c;
    o->t = t;
    o->next = NULL;
    pv__mutex_lock(&q->lock);
    bool full = q->count >= JOBS_MAX;
    if (!full) {
        *(q->last != NULL ? &q->last->next : &q->first) = o;
        q->last = o;
        q->count++;
        pv__must(pthread_cond_signal(&q->cond));
    }
    pv__mutex_unlock(&q->lock);
    if (full) {
        return false;
    }
    c->op = o;
    t->pending++;
    set_mask(t, c, 0);
    COUNT(t, io_jobs, 1);
    return true;
}

/* Serves the complete request at p, the first of avail bytes of input. */
static enum outcome serve(lane_thread *t, conn *c, char *p, size_t avail) {
    op *o = &t->op;
    int why = admit(t, c, p, o);
    if (why >= 0) {
        return hand_over(t, c, p, avail, why);
    }
    bool wait = false;
    bool locked = false;
    int rc = o->v != NULL ? pv_vol_lookup_cached(o->v, o->key, &o->entry) : 0;
    bool unplaced = rc == PV_EMORE && o->kind != OP_WRITE;
    uint64_t size = o->v == NULL ? 0 : (uint64_t)(o->entry.size < 0 ? -(int64_t)o->entry.size : o->entry.size);
    if (o->shards != NULL) {
        o->t = t; /* its size is looked at where it is found */
    } else if (o->kind == OP_WRITE) {
        /* An overwrite reads what is there, if only its cookie: of a deleted or an empty needle, too. */
        wait = o->fsync || o->copies.count != 0 || c->head.content_length > INLINE_WRITE || rc == 0;
        if (rc < 0 && rc != PV_ENOTFOUND) {
            why = PV_LANE_WHY_VOLUME;
        }
    } else if (unplaced) {
        wait = true;
    } else if (!is_there(o, rc)) {
        why = rc == PV_EINVAL ? PV_LANE_WHY_VOLUME : PV_LANE_WHY_NEEDLE;
    } else if (size > t->lane->body_max) {
        why = PV_LANE_WHY_SIZE;
    } else if (size > LARGE) {
        if (reserve(t->lane, size)) {
            c->charged += size;
        } else {
            why = PV_LANE_WHY_SIZE;
        }
    }
    if (why < 0 && !wait) {
        if (o->kind == OP_WRITE && !make_needle(t, c, p, o)) {
            why = PV_LANE_WHY_UPLOAD;
        } else {
            wait = work(o, true) != 0;
            locked = wait && o->kind != OP_READ;
            c->charged += o->charge;
        }
    }
    if (why >= 0 || !wait) {
        let_go(o);
        return why >= 0 ? hand_over(t, c, p, avail, why) : worked(t, c, p, avail, o);
    }
    op *job = pv__malloc(sizeof *job);
    if (job == NULL || !stash(t, c, p, avail, (size_t)c->need)) {
        let_go(o);
        if (job == NULL) {
            close_conn(t, c);
        }
        pv__free(job);
        return GONE;
    }
    /* The texts of the request moved with the input: look again. Settings may have changed since, too. */
    const bool of_shards = o->shards != NULL;
    let_go(o);
    pv_entry entry = o->entry;
    job->v = NULL;
    job->shards = NULL;
    why = admit(t, c, c->buf, job);
    if (of_shards) {
        uncharge(t->lane, c); /* the job finds the needle again */
        why = why < 0 && job->shards == NULL ? PV_LANE_WHY_VOLUME : why;
    }
    job->entry = entry;
    job->unplaced = unplaced;
    job->locked = locked;
    memset(&job->rd, 0, sizeof job->rd);
    if (why < 0 && job->kind == OP_WRITE && !make_needle(t, c, c->buf, job)) {
        why = PV_LANE_WHY_UPLOAD;
    }
    if (why < 0 && !queue_job(t, c, job)) {
        why = PV_LANE_WHY_SIZE;
    }
    if (why >= 0) {
        let_go(job);
        pv__free(job);
        return hand_over(t, c, c->buf, c->len, why);
    }
    return PENDING;
}

static void make_ready(lane_thread *t, conn *c) {
    c->ready = true;
    c->ready_next = NULL;
    *(t->ready_last != NULL ? &t->ready_last->ready_next : &t->ready_first) = c;
    t->ready_last = c;
}

static void next_request(conn *c) {
    pv__head_reset(&c->head);
    c->head_len = 0;
    c->need = 0;
}

/* Goes through the n bytes of input at p, which lie in the scratch buffer or in c->buf. False: c is gone. */
static bool process(lane_thread *t, conn *c, char *p, size_t n) {
    unsigned served = 0;
    while (n > 0) {
        if (c->head_len == 0) {
            int rc = pv__head_feed(&c->head, p, n);
            if (rc == PV_EMORE) {
                break;
            }
            if (rc < 0) {
                (void)hand_over(t, c, p, n, PV_LANE_WHY_HEAD);
                return false;
            }
            c->head_len = (size_t)rc;
            c->need = c->head_len + c->head.content_length;
            c->started_ns = t->now_ns;
            if (n < c->need) { /* before more of it is taken in */
                int why = admit(t, c, p, &t->op);
                if (why < 0) {
                    let_go(&t->op);
                    if (c->need > LARGE) {
                        if (reserve(t->lane, c->need)) {
                            c->charged += c->need;
                        } else {
                            why = PV_LANE_WHY_SIZE;
                        }
                    }
                }
                if (why >= 0) {
                    (void)hand_over(t, c, p, n, why);
                    return false;
                }
            }
        }
        if (n < c->need) {
            break;
        }
        enum outcome result = serve(t, c, p, n);
        if (result == GONE) {
            return false;
        }
        if (result == PENDING) {
            return true;
        }
        p += c->need;
        n -= (size_t)c->need;
        next_request(c);
        if (result == BLOCKED) {
            return stash(t, c, p, n, n);
        }
        if (++served == PIPELINE_MAX && n > 0) {
            COUNT(t, yields, 1);
            if (!stash(t, c, p, n, n)) {
                return false;
            }
            make_ready(t, c);
            return true;
        }
    }
    return stash(t, c, p, n, c->need != 0 ? (size_t)c->need : 2 * n);
}

/* False: c is gone. */
static bool read_conn(lane_thread *t, conn *c) {
    for (unsigned turn = 0; turn < RECV_TURNS; turn++) {
        char *to = t->scratch;
        size_t room = sizeof t->scratch;
        if (c->len != 0) {
            if (c->len == c->cap && !stash(t, c, c->buf, c->len, c->len * 2)) {
                return false;
            }
            to = c->buf + c->len;
            room = c->cap - c->len;
        }
        ssize_t n;
        do {
            n = recv(c->fd, to, room, MSG_DONTWAIT);
        } while (n < 0 && errno == EINTR);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            return true;
        }
        if (n <= 0) {
            if (n == 0 && c->len != 0) {
                (void)hand_over(t, c, c->buf, c->len, PV_LANE_WHY_EOF);
            } else {
                close_conn(t, c);
            }
            return false;
        }
        COUNT(t, received_bytes, n);
        touch(t, c);
        if (c->len != 0) {
            c->len += (size_t)n;
            to = c->buf;
            if (c->need != 0 && c->len < c->need) {
                continue; /* a body: no need to look at it yet */
            }
        }
        return process(t, c, to, c->len != 0 ? c->len : (size_t)n);
    }
    return true;
}

/* The socket has room again. */
static void write_conn(lane_thread *t, conn *c) {
    out *o = c->out;
    size_t sent = 0;
    if (!send_some(t, c, o->iov + o->at, o->count - o->at, &sent)) {
        close_conn(t, c);
        return;
    }
    if (sent != 0) {
        touch(t, c);
    }
    o->at += skip(o->iov + o->at, o->count - o->at, sent);
    if (o->at < o->count) {
        return;
    }
    bool closing = o->close;
    out_free(o);
    c->out = NULL;
    if (conclude(t, c, closing) == GONE) {
        return;
    }
    set_mask(t, c, EPOLLIN);
    if (c->len != 0) {
        make_ready(t, c);
    }
}

/* A job of this thread has ended. */
static void job_done(lane_thread *t, op *o) {
    conn *c = o->c;
    c->op = NULL;
    t->pending--;
    c->charged += o->charge;
    let_go(o);
    enum outcome result;
    if (c->dead) {
        pv_read_free(&o->rd);
        close_conn(t, c);
        result = GONE;
    } else {
        result = worked(t, c, c->buf, c->len, o);
    }
    pv__free(o);
    if (result == GONE) {
        return;
    }
    size_t left = c->len - (size_t)c->need;
    char *rest = c->buf + c->need;
    next_request(c);
    if (!stash(t, c, rest, left, left)) {
        return;
    }
    if (result == DONE) {
        set_mask(t, c, EPOLLIN);
        if (left != 0) {
            make_ready(t, c);
        }
    }
}

/* ------------------------------------------------------------------ I/O threads */

static void post(lane_thread *t, msg *m) {
    m->next = NULL;
    pv__mutex_lock(&t->inbox_lock);
    *(t->inbox_last != NULL ? &t->inbox_last->next : &t->inbox) = m;
    t->inbox_last = m;
    pv__mutex_unlock(&t->inbox_lock);
    signal_fd(t->wake_fd);
}

static int queue_init(job_queue *q, uint32_t size) {
    if (pv__mutex_init(&q->lock) < 0 || pv__cond_init(&q->cond) < 0) {
        return PV_ENOMEM;
    }
    q->size = size;
    q->threads = pv__calloc(size, sizeof *q->threads);
    return q->threads == NULL ? PV_ENOMEM : 0;
}

static void queue_destroy(job_queue *q) {
    pv__must(pthread_mutex_destroy(&q->lock));
    pv__must(pthread_cond_destroy(&q->cond));
    pv__free(q->threads);
}

/* Does a write whose volume has replicas: here, then on all of them. What goes wrong with them is for the other lane, which
 * does it all again: here nothing changes by that, and it has the words for the client. */
static void write_copies(pv_lane *l, op *o, pv__copy_conns *conns) {
    uint64_t begin_ns = clock_ns(CLOCK_MONOTONIC);
    if (!pv__routes_stands(&l->routes, o->vid, o->copies.stamp)) {
        o->why = PV_LANE_WHY_VOLUME; /* another write has found that a replica does not answer */
        return;
    }
    (void)work(o, false);
    if (o->why >= 0) {
        return;
    }
    uint8_t random[4];
    if (getrandom(random, sizeof random, 0) != (ssize_t)sizeof random) {
        abort(); /* as random_bytes: four bytes are never cut short */
    }
    o->request_id_len =
        pv_request_id(clock_ns(CLOCK_REALTIME), pv__get_be32(random), o->request_id, sizeof o->request_id);
    pv__copy what = {
        .path = span_text(o->c->buf, o->c->head.path),
        .fsync = o->fsync,
        .last_modified_s = o->n.last_modified_s,
        .name = pv__text((const char *)o->n.name, o->n.name_size),
        .mime = pv__text((const char *)o->n.mime, o->n.mime_size),
        .request_id = pv__text(o->request_id, o->request_id_len),
        .data = o->n.data,
        .data_len = o->n.data_size,
    };
    if (what.mime.n == 0 && l->mime != NULL) {
        pv_text ext;
        pv_name_ext(what.name.p, what.name.n, &ext);
        (void)pv_mime_lookup(l->mime, ext.p, ext.n, &what.mime);
    }
    if (pv__copy_send(conns, &o->copies, &what) < 0) {
        pv__routes_drop(&l->routes, o->vid, o->copies.stamp);
        o->why = PV_LANE_WHY_COPY;
    }
    o->copy_ns = clock_ns(CLOCK_MONOTONIC) - begin_ns;
}

static void *io_main(void *arg) {
    job_queue *q = arg;
    pv__copy_conns conns = {0};
    for (;;) {
        pv__mutex_lock(&q->lock);
        while (q->first == NULL && !q->end) {
            pv__cond_wait(&q->cond, &q->lock);
        }
        op *o = q->first;
        if (o != NULL) {
            q->first = o->next;
            if (q->first == NULL) {
                q->last = NULL;
            }
            q->count--;
        }
        pv__mutex_unlock(&q->lock);
        if (o == NULL) {
            pv__copy_close(&conns);
            return NULL;
        }
        if (o->copies.count != 0) {
            write_copies(q->lane, o, &conns);
        } else {
            (void)work(o, false);
        }
        o->reply = (msg){.done = o};
        post(o->t, &o->reply);
    }
}

static int queue_start(job_queue *q, const char *name) {
    int rc = 0;
    while (rc == 0 && q->running < q->size) {
        rc = pthread_create(&q->threads[q->running], NULL, io_main, q);
        if (rc == 0) {
            (void)pthread_setname_np(q->threads[q->running], name);
            q->running++;
        }
    }
    return rc;
}

/* Ends the threads when they have done what is queued. */
static void queue_end(job_queue *q) {
    pv__mutex_lock(&q->lock);
    q->end = true;
    pv__cond_broadcast(&q->cond);
    pv__mutex_unlock(&q->lock);
    while (q->running > 0) {
        pv__must(pthread_join(q->threads[--q->running], NULL));
    }
}

/* ------------------------------------------------------------------ accepting */

static bool open_conn(lane_thread *t, int fd, uint32_t flags) {
    conn *c = pv__calloc(1, sizeof *c);
    if (c == NULL) {
        return false;
    }
    c->fd = fd;
    c->flags = flags;
    c->mask = EPOLLIN;
    c->active_ms = now_ms(t);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0) {
        pv__free(c);
        return false;
    }
    list_append(t, c);
    return true;
}

static void listen_here(lane_thread *t, bool on) {
    if (t->listening == on) {
        return;
    }
    t->listening = on;
    for (size_t i = 0; i < t->lane->listener_count; i++) {
        listener *one = &t->lane->listeners[i];
        struct epoll_event ev = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.ptr = one};
        (void)epoll_ctl(t->epoll_fd, on ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, one->fd, &ev);
    }
}

static void pause_accepting(lane_thread *t) {
    COUNT(t, accept_pauses, 1);
    listen_here(t, false);
    t->accept_at_ms = now_ms(t) + ACCEPT_RETRY_MS;
}

static void accept_some(lane_thread *t, const listener *from, unsigned most) {
    pv_lane *l = t->lane;
    for (unsigned i = 0; i < most; i++) {
        if (atomic_fetch_add(&l->connections, 1) >= l->max_connections) {
            atomic_fetch_sub(&l->connections, 1);
            pause_accepting(t);
            return;
        }
        int fd = accept4(from->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0 && open_conn(t, fd, from->flags)) {
            COUNT(t, accepted, 1);
            continue;
        }
        int error = errno;
        atomic_fetch_sub(&l->connections, 1);
        if (fd >= 0) {
            (void)close(fd);
        } else if (error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM) {
            pause_accepting(t);
            return;
        } else if (error == EAGAIN || error == EWOULDBLOCK) {
            return;
        } /* else: the client was gone before we looked */
    }
}

/* ------------------------------------------------------------------ the loop of a lane thread */

/* Takes the connections that came back into the list. Before any event is looked at: it may be of one of them. Nobody woke this
 * thread for them; it sleeps no longer than they may be idle. */
static void take_given(lane_thread *t) {
    pv__mutex_lock(&t->inbox_lock);
    conn *c = t->given;
    t->given = NULL;
    pv__mutex_unlock(&t->inbox_lock);
    while (c != NULL) {
        conn *next = c->next;
        list_append(t, c);
        COUNT(t, given, 1);
        c = next;
    }
}

static void read_inbox(lane_thread *t) {
    uint64_t drained;
    (void)!read(t->wake_fd, &drained, sizeof drained);
    pv__mutex_lock(&t->inbox_lock);
    msg *m = t->inbox;
    t->inbox = t->inbox_last = NULL;
    pv__mutex_unlock(&t->inbox_lock);
    while (m != NULL) {
        msg *next = m->next; /* m is a part of what is freed with the job */
        job_done(t, m->done);
        m = next;
    }
}

static void on_event(lane_thread *t, conn *c, uint32_t events) {
    if (c->op != NULL) {
        if ((events & (EPOLLERR | EPOLLHUP)) != 0) { /* reported until it is out of epoll */
            (void)epoll_ctl(t->epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
            c->dead = true;
        }
    } else if (c->out != NULL) {
        write_conn(t, c);
    } else if (!c->ready) {
        (void)read_conn(t, c);
    }
}

static void run_ready(lane_thread *t) {
    conn *c = t->ready_first;
    t->ready_first = t->ready_last = NULL;
    while (c != NULL) {
        conn *next = c->ready_next;
        c->ready = false;
        if (process(t, c, c->buf, c->len) && !c->ready && c->op == NULL && c->out == NULL) {
            set_mask(t, c, EPOLLIN);
        }
        c = next;
    }
}

static void close_idle(lane_thread *t) {
    uint64_t now = now_ms(t);
    while (t->first != NULL && t->first->active_ms + t->lane->idle_ms <= now) {
        conn *c = t->first;
        if (c->op != NULL) {
            touch(t, c); /* our turn, not the client's */
        } else {
            COUNT(t, idle_closed, 1);
            close_conn(t, c);
        }
    }
}

static int next_timeout(const lane_thread *t) {
    if (t->ready_first != NULL) {
        return 0;
    }
    uint64_t now = now_ms(t);
    uint64_t due = UINT64_MAX;
    if (t->lane->idle_ms != 0) { /* without a connection, too: one may come back meanwhile */
        due = (t->first != NULL ? t->first->active_ms : now) + t->lane->idle_ms;
    }
    if (!t->listening && t->accept_at_ms != 0 && t->accept_at_ms < due) {
        due = t->accept_at_ms;
    }
    if (due == UINT64_MAX) {
        return -1;
    }
    uint64_t wait = due > now ? due - now : 0;
    return wait > 60000 ? 60000 : (int)wait + 1;
}

/* The begin of the stop: no new requests are read here any more. */
static void sweep(lane_thread *t) {
    t->accept_at_ms = 0;
    if (t->listening) {
        for (size_t i = 0; i < t->lane->listener_count; i++) {
            accept_some(t, &t->lane->listeners[i], DRAIN_ACCEPT_MAX);
        }
    }
    listen_here(t, false);
    t->accept_at_ms = 0;
    conn *next;
    for (conn *c = t->first; c != NULL; c = next) {
        next = c->next;
        if (c->op != NULL || c->out != NULL) {
            continue;
        }
        /* The list may be changed by this, but only at its end: what is touched goes there, and is looked at once more. */
        if (c->len == 0) {
            conn *before = c;
            if (!read_conn(t, before) || before->op != NULL || before->out != NULL) {
                if (next == NULL) {
                    break;
                }
                continue;
            }
        }
        if (c->len == 0) {
            close_conn(t, c);
        } else {
            (void)hand_over(t, c, c->buf, c->len, PV_LANE_WHY_STOP);
        }
    }
}

static void *lane_main(void *arg) {
    lane_thread *t = arg;
    pv_lane *l = t->lane;
    struct epoll_event events[EVENTS];
    bool swept = false;
    bool quiet = false;
    uint64_t cut = 0;
    t->now_ns = clock_ns(CLOCK_MONOTONIC);
    listen_here(t, true);
    for (;;) {
        int n = epoll_wait(t->epoll_fd, events, EVENTS, next_timeout(t));
        t->now_ns = clock_ns(CLOCK_MONOTONIC);
        take_given(t);
        bool woken = false;
        const listener *arrived[LISTENERS_MAX];
        size_t arrivals = 0;
        for (int i = 0; i < n; i++) {
            void *ptr = events[i].data.ptr;
            if (ptr == t) {
                woken = true;
            } else if (ptr >= (void *)l->listeners && ptr < (void *)(l->listeners + LISTENERS_MAX)) {
                arrived[arrivals++] = ptr;
            } else {
                on_event(t, ptr, events[i].events);
            }
        }
        /* Behind the connections' events: none of them can meet a connection that was made since. */
        run_ready(t);
        if (woken) {
            read_inbox(t);
        }
        for (size_t i = 0; i < arrivals && t->listening; i++) {
            accept_some(t, arrived[i], ACCEPT_MAX);
        }
        if (l->idle_ms != 0) {
            close_idle(t);
        }
        if (!t->listening && t->accept_at_ms != 0 && t->accept_at_ms <= now_ms(t)) {
            t->accept_at_ms = 0;
            listen_here(t, true);
        }
        if (!atomic_load(&l->stopping)) {
            continue;
        }
        if (!swept) {
            take_given(t); /* nothing is given any more: what came before the stop is all here */
            read_inbox(t);
            sweep(t);
            swept = t->reads_ended = true;
        }
        if (atomic_load(&l->cut)) {
            conn *next;
            for (conn *c = t->first; c != NULL; c = next) {
                next = c->next;
                if (c->op == NULL) {
                    cut++;
                    close_conn(t, c);
                }
            }
        }
        bool over = t->first == NULL;
        if ((!quiet && t->pending == 0) || over) {
            quiet = true;
            pv__mutex_lock(&l->life);
            t->quiet = true;
            t->ended = over;
            l->cut_count += over ? cut : 0;
            pv__cond_broadcast(&l->life_cond);
            pv__mutex_unlock(&l->life);
        }
        if (over) {
            return NULL;
        }
    }
}

/* ------------------------------------------------------------------ life */

static void thread_free(lane_thread *t) {
    if (t == NULL) {
        return;
    }
    if (t->epoll_fd >= 0) {
        (void)close(t->epoll_fd);
    }
    if (t->wake_fd >= 0) {
        (void)close(t->wake_fd);
    }
    for (conn *c = t->given; c != NULL;) { /* came back too late */
        conn *next = c->next;
        (void)close(c->fd);
        pv__free(c);
        c = next;
    }
    pv__must(pthread_mutex_destroy(&t->inbox_lock));
    pv__free(t);
}

static lane_thread *thread_new(pv_lane *l) {
    lane_thread *t = pv__calloc(1, sizeof *t);
    if (t == NULL || pv__mutex_init(&t->inbox_lock) < 0) {
        pv__free(t);
        return NULL;
    }
    t->lane = l;
    t->date_s = -1;
    t->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    t->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = t};
    if (t->epoll_fd < 0 || t->wake_fd < 0 || epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, t->wake_fd, &ev) < 0) {
        thread_free(t);
        return NULL;
    }
    return t;
}

int pv_lane_new(const pv_lane_opts *opts, pv_lane **result) {
    *result = NULL;
    size_t server_len = opts->server != NULL ? strlen(opts->server) : 0;
    if (opts->registry == NULL || opts->threads == 0 || opts->threads > THREADS_MAX || opts->io_threads == 0 ||
        opts->io_threads > THREADS_MAX || opts->sync_threads == 0 || opts->sync_threads > THREADS_MAX ||
        opts->mailbox == 0 || opts->max_connections == 0 || server_len >= SERVER_MAX || opts->body_bytes > UINT32_MAX) {
        return PV_EINVAL;
    }
    pv_lane *l = pv__calloc(1, sizeof *l);
    if (l == NULL) {
        return PV_ENOMEM;
    }
    l->registry = opts->registry;
    l->mime = opts->mime;
    if (server_len != 0) {
        memcpy(l->server, opts->server, server_len);
    }
    l->server_len = server_len;
    l->size_limit = opts->size_limit_bytes;
    l->body_max = opts->body_bytes;
    l->budget = opts->budget_bytes;
    l->idle_ms = opts->idle_timeout_ms;
    l->max_connections = opts->max_connections;
    l->fix_orientation = opts->fix_orientation != 0;
    atomic_init(&l->serve, opts->serve);
    l->mail_cap = opts->mailbox;
    l->mail_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int rc = 0;
    if (pv__mutex_init(&l->life) < 0 || pv__cond_init(&l->life_cond) < 0 || queue_init(&l->io, opts->io_threads) < 0 ||
        queue_init(&l->sync, opts->sync_threads) < 0 || queue_init(&l->copy, COPY_THREADS) < 0 ||
        pv__routes_init(&l->routes) < 0 || pv__mutex_init(&l->mail_lock) < 0) {
        if (l->mail_fd >= 0) {
            (void)close(l->mail_fd);
        }
        pv__free(l);
        return PV_ENOMEM;
    }
    l->copy.lane = l;
    l->mail = pv__calloc(l->mail_cap, sizeof *l->mail);
    l->threads = pv__calloc(opts->threads, sizeof(lane_thread *));
    rc = l->mail == NULL || l->threads == NULL ? PV_ENOMEM : l->mail_fd < 0 ? PV_ESYS : 0;
    for (uint32_t i = 0; rc == 0 && i < opts->threads; i++) {
        l->threads[i] = thread_new(l);
        rc = l->threads[i] == NULL ? PV_ENOMEM : 0;
        l->thread_count += rc == 0;
    }
    if (rc < 0) {
        pv_lane_free(l);
        return rc;
    }
    *result = l;
    return 0;
}

int pv_lane_listen(pv_lane *l, int fd, uint32_t flags) {
    if (l->listener_count == LISTENERS_MAX || l->started) {
        return PV_EINVAL;
    }
    l->listeners[l->listener_count++] = (listener){fd, flags & PV_LANE_PUBLIC};
    return 0;
}

static void wake_all(pv_lane *l) {
    for (uint32_t i = 0; i < l->thread_count; i++) {
        signal_fd(l->threads[i]->wake_fd);
    }
}

int pv_lane_start(pv_lane *l) {
    sigset_t all, before;
    int rc = 0;
    (void)sigfillset(&all);
    pv__must(pthread_sigmask(SIG_SETMASK, &all, &before)); /* signals are for Python's main thread */
    l->started = true;
    rc = queue_start(&l->io, "lane-io");
    rc = rc == 0 ? queue_start(&l->sync, "lane-sync") : rc;
    for (uint32_t i = 0; rc == 0 && i < l->thread_count; i++) {
        lane_thread *t = l->threads[i];
        rc = pthread_create(&t->id, NULL, lane_main, t);
        if (rc == 0) {
            (void)pthread_setname_np(t->id, "lane");
            t->running = true;
        }
    }
    pv__must(pthread_sigmask(SIG_SETMASK, &before, NULL));
    if (rc != 0) {
        (void)pv_lane_stop(l, 0);
        return PV_ESYS;
    }
    return 0;
}

void pv_lane_serve(pv_lane *l, uint32_t serve_bits) {
    atomic_store(&l->serve, serve_bits);
}

int pv_lane_replicas(pv_lane *l, uint32_t vid, const char *hosts, uint32_t ttl_ms) {
    int rc = 0;
    if (*hosts != '\0') {
        pv__mutex_lock(&l->life);
        if (l->stopped || !l->started) {
            rc = PV_EINVAL;
        } else if (l->copy.running < l->copy.size) {
            sigset_t all, before;
            (void)sigfillset(&all);
            pv__must(pthread_sigmask(SIG_SETMASK, &all, &before));
            (void)queue_start(&l->copy, "lane-copy"); /* fewer do, too */
            pv__must(pthread_sigmask(SIG_SETMASK, &before, NULL));
            rc = l->copy.running == 0 ? PV_EINVAL : 0;
        }
        pv__mutex_unlock(&l->life);
    }
    int set = pv__routes_set(&l->routes, vid, rc == 0 ? hosts : "", clock_ns(CLOCK_MONOTONIC) / 1000000 + ttl_ms);
    return rc < 0 ? rc : set;
}

int pv_lane_give(pv_lane *l, int fd, uint32_t flags) {
    conn *c = pv__calloc(1, sizeof *c);
    if (c == NULL) {
        return PV_ENOMEM;
    }
    c->fd = fd;
    c->flags = flags & (PV_LANE_PUBLIC | PV_LANE_SERVED | PV_LANE_LENIENT);
    c->mask = EPOLLIN;
    c->active_ms = clock_ns(CLOCK_MONOTONIC) / 1000000;
    lane_thread *t = l->threads[atomic_fetch_add(&l->next_thread, 1) % l->thread_count];
    int rc = PV_ECLOSED;
    pv__mutex_lock(&l->life);
    if (l->started && !atomic_load(&l->stopping)) {
        /* Under the lock that the thread takes before it looks at an event: it finds the connection in its list then. */
        struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
        pv__mutex_lock(&t->inbox_lock);
        rc = epoll_ctl(t->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0 ? PV_ESYS : 0;
        if (rc == 0) {
            c->next = t->given;
            t->given = c;
            atomic_fetch_add(&l->connections, 1);
        }
        pv__mutex_unlock(&t->inbox_lock);
    }
    pv__mutex_unlock(&l->life);
    if (rc < 0) {
        pv__free(c);
    }
    return rc;
}

int pv_lane_mail_fd(const pv_lane *l) {
    return l->mail_fd;
}

int pv_lane_take(pv_lane *l, pv_lane_item *items, size_t max) {
    /* Before the look at the ring: what comes after that look signals anew. */
    uint64_t drained;
    (void)!read(l->mail_fd, &drained, sizeof drained);
    pv__mutex_lock(&l->mail_lock);
    size_t n = 0;
    while (n < max && l->mail_count > 0) {
        items[n++] = l->mail[l->mail_at];
        l->mail_at = (l->mail_at + 1) % l->mail_cap;
        l->mail_count--;
    }
    bool over = n == 0 && l->mail_end;
    bool more = l->mail_count > 0 || l->mail_end;
    pv__mutex_unlock(&l->mail_lock);
    if (more) {
        signal_fd(l->mail_fd);
    }
    return over ? PV_ECLOSED : (int)n;
}

void pv_lane_item_free(pv_lane *l, pv_lane_item *item) {
    pv__free(item->data);
    item->data = NULL;
    item->size = 0;
    if (item->charged != 0) {
        atomic_fetch_sub(&l->held, item->charged);
        item->charged = 0;
    }
}

void pv_lane_quiesce(pv_lane *l) {
    pv__mutex_lock(&l->life);
    atomic_store(&l->stopping, true);
    wake_all(l);
    for (uint32_t i = 0; i < l->thread_count; i++) {
        while (l->threads[i]->running && !l->threads[i]->quiet) {
            pv__cond_wait(&l->life_cond, &l->life);
        }
    }
    for (size_t i = 0; i < l->listener_count; i++) {
        if (l->listeners[i].fd >= 0) {
            (void)close(l->listeners[i].fd);
            l->listeners[i].fd = -1;
        }
    }
    pv__mutex_unlock(&l->life);
    pv__mutex_lock(&l->mail_lock);
    l->mail_end = true;
    pv__mutex_unlock(&l->mail_lock);
    signal_fd(l->mail_fd);
}

int pv_lane_stop(pv_lane *l, uint32_t deadline_ms) {
    pv_lane_quiesce(l);
    uint64_t due_ns = clock_ns(CLOCK_MONOTONIC) + (uint64_t)deadline_ms * 1000000;
    struct timespec until = {(time_t)(due_ns / 1000000000), (long)(due_ns % 1000000000)};
    pv__mutex_lock(&l->life);
    bool mine = !l->stopped;
    l->stopped = true;
    for (uint32_t i = 0; i < l->thread_count; i++) {
        int rc = 0;
        while (l->threads[i]->running && !l->threads[i]->ended) {
            if (rc == 0) {
                rc = pthread_cond_timedwait(&l->life_cond, &l->life, &until);
            } else {
                atomic_store(&l->cut, true);
                wake_all(l);
                pv__cond_wait(&l->life_cond, &l->life);
            }
        }
    }
    int cut = (int)l->cut_count;
    pv__mutex_unlock(&l->life);
    if (mine) {
        for (uint32_t i = 0; i < l->thread_count; i++) {
            if (l->threads[i]->running) {
                pv__must(pthread_join(l->threads[i]->id, NULL));
            }
        }
        queue_end(&l->io);
        queue_end(&l->sync);
        queue_end(&l->copy);
    }
    return cut;
}

void pv_lane_stat(pv_lane *l, pv_lane_stats *stats) {
    memset(stats, 0, sizeof *stats);
    _Static_assert(sizeof(pv_lane_stats) % sizeof(uint64_t) == 0, "counters only");
    uint64_t *to = (uint64_t *)stats;
    for (uint32_t i = 0; i < l->thread_count; i++) {
        const uint64_t *from = (const uint64_t *)&l->threads[i]->stats;
        for (size_t k = 0; k < sizeof *stats / sizeof *to; k++) {
            to[k] += __atomic_load_n(&from[k], __ATOMIC_RELAXED);
        }
    }
    stats->connections = atomic_load(&l->connections);
    stats->held_bytes = atomic_load(&l->held);
}

void pv_lane_free(pv_lane *l) {
    if (l == NULL) {
        return;
    }
    (void)pv_lane_stop(l, 0);
    for (size_t i = 0; i < l->mail_count; i++) {
        pv_lane_item *item = &l->mail[(l->mail_at + i) % l->mail_cap];
        (void)close(item->fd);
        pv_lane_item_free(l, item);
    }
    for (uint32_t i = 0; i < l->thread_count; i++) {
        thread_free(l->threads[i]);
    }
    pv__must(pthread_mutex_destroy(&l->life));
    pv__must(pthread_cond_destroy(&l->life_cond));
    queue_destroy(&l->io);
    queue_destroy(&l->sync);
    queue_destroy(&l->copy);
    pv__routes_destroy(&l->routes);
    pv__must(pthread_mutex_destroy(&l->mail_lock));
    if (l->mail_fd >= 0) {
        (void)close(l->mail_fd);
    }
    pv__free(l->threads);
    pv__free(l->mail);
    pv__free(l);
}
