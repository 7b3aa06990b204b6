/* pv_copy_int.h - sends copies of a needle to the other servers of its volume; for the fast lane's threads. */
#ifndef PV_COPY_INT_H
#define PV_COPY_INT_H

#include "pv_int.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/socket.h>

#define PV__COPIES_MAX 4U /* servers besides this one */
#define PV__COPY_KEPT 8U  /* connections a thread keeps */
#define PV__COPY_SLOTS 1024U

typedef struct pv__target {
    struct sockaddr_storage addr;
    socklen_t addr_len;
    char host[64]; /* as it is written in Host, ends with NUL */
} pv__target;

typedef struct pv__targets {
    uint64_t stamp; /* of the entry: another one means other news */
    uint32_t count;
    pv__target at[PV__COPIES_MAX];
} pv__targets;

/* Where the copies of volumes go, by volume id; two ids may share a slot, then the later one has it. */
typedef struct pv__routes {
    pthread_mutex_t lock;
    uint64_t stamp;
    struct pv__route *slots;
} pv__routes;

int pv__routes_init(pv__routes *r) PV_WUR; /* PV_ENOMEM */
void pv__routes_destroy(pv__routes *r);
/* hosts: `address:port` of each, one blank between; addresses are numbers. PV_EINVAL for anything else, and for too many:
 * then the volume has no entry, as with hosts == "". */
int pv__routes_set(pv__routes *r, uint32_t vid, const char *hosts, uint64_t until_ms) PV_WUR;
/* True and *to if there is an entry with at least `copies` - 1 servers that has not expired. */
bool pv__routes_find(pv__routes *r, uint32_t vid, uint32_t copies, uint64_t now_ms, pv__targets *to);
/* True while the entry of that stamp stands. */
bool pv__routes_stands(pv__routes *r, uint32_t vid, uint64_t stamp);
/* Drops the entry of that stamp. */
void pv__routes_drop(pv__routes *r, uint32_t vid, uint64_t stamp);

/* Connections of one thread. Zero-initialised; pv__copy_close at the end. */
typedef struct pv__copy_conns {
    struct {
        struct sockaddr_storage addr;
        socklen_t addr_len;
        int fd; /* plus 1; 0: free */
        uint64_t used_ms;
    } kept[PV__COPY_KEPT];
} pv__copy_conns;

/* A needle to be copied. All texts are checked: nothing in them ends a line. */
typedef struct pv__copy {
    pv_text path; /* as it came, and as it is sent: nothing in it needs escaping */
    bool fsync;
    uint64_t last_modified_s;
    pv_text name;
    pv_text mime; /* empty: not told */
    pv_text request_id;
    const uint8_t *data;
    size_t data_len;
} pv__copy;

/* Posts the needle to all targets and waits for all answers. 0: each has said that it is stored. PV_ESYS otherwise, and
 * nobody knows which have it. Blocks up to a few seconds; retries once where a kept connection turns out to be closed. */
int pv__copy_send(pv__copy_conns *conns, const pv__targets *to, const pv__copy *what) PV_WUR;
void pv__copy_close(pv__copy_conns *conns);

#endif
