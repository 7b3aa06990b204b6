/* pv_lane_int.h - the lane's recogniser of request heads (pv_lane_head.c), shared with its tests and fuzz target. */
#ifndef PV_LANE_INT_H
#define PV_LANE_INT_H

#include <stdbool.h>

#include "pv_int.h"

#define PV__HEAD_MAX 8192U /* bytes of a head; longer ones are for the other lane */
#define PV__HEAD_LINES 64U /* header lines */

enum pv__method { PV__M_NONE = 0, PV__M_GET, PV__M_HEAD, PV__M_PUT, PV__M_POST, PV__M_DELETE };

/* Where a text stands in the input, counted from the first byte of the head. n == 0: absent or empty. */
typedef struct pv__span {
    uint32_t at;
    uint32_t n;
} pv__span;

/* Headers whose value matters to a needle request; the others on the list of known names are only checked for form. */
enum pv__field {
    PV__F_IGNORED = 0,
    PV__F_CREDENTIALS, /* something a replica may have to see: only that it is there */
    PV__F_HOST,
    PV__F_CONNECTION,
    PV__F_CONTENT_LENGTH,
    PV__F_ACCEPT_ENCODING,
    PV__F_RANGE,
    PV__F_IF_MODIFIED_SINCE,
    PV__F_IF_NONE_MATCH,
    PV__F_ORIGIN,
    PV__F_CONTENT_TYPE,
    PV__F_CONTENT_DISPOSITION,
    PV__F_CONTENT_ENCODING,
    PV__F_COUNT
};

typedef struct pv__head {
    uint32_t pos;            /* first byte not yet understood: the begin of a line */
    uint32_t scan;           /* looked for that line's end up to here */
    uint32_t lines;          /* header lines seen */
    uint32_t seen;           /* bits of enum pv__field */
    uint8_t method;          /* enum pv__method; 0: the request line is not complete */
    bool close;              /* Connection: close */
    bool credentials;        /* Authorization or Cookie */
    uint64_t content_length; /* 0 without the header */
    pv__span path;
    pv__span query; /* without its "?" */
    pv__span fields[PV__F_COUNT];
} pv__head;

static inline void pv__head_reset(pv__head *h) {
    memset(h, 0, sizeof *h);
}

/* Goes on with a head of which len bytes (more than at the last call, the earlier ones unchanged) are there. Never looks at
 * a byte twice but for those of the line that was incomplete. Returns the head's length when it is complete, PV_EMORE when
 * it is a good beginning, PV_EPARSE for everything else: wrong, unusual, or too long. Pure. */
int pv__head_feed(pv__head *h, const char *buf, size_t len) PV_WUR;

#endif
