/* fuzz_lane.c - connections to the fast lane: whatever a client sends, in one piece or two, the lane answers, hands the
 * connection over or closes it, and keeps nothing of it. Input: two bytes of where to cut, then what is sent.
 *
 * A volume with one file stands behind it; it is made anew now and then, so that what is written does not pile up. */
#include "../test/t.h"

#include <poll.h>
#include <stdatomic.h>
#include <sys/socket.h>

#define PER_VOLUME 4096U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static struct {
    pv_reg *reg;
    pv_mime *mime;
    pv_lane *lane;
    pv_vol *vol;
    int files[2];
    unsigned runs;
    pthread_t taker;
} s;

static void *taker_main(void *arg) {
    (void)arg;
    for (;;) {
        pv_lane_item items[4];
        struct pollfd mail = {pv_lane_mail_fd(s.lane), POLLIN, 0};
        (void)poll(&mail, 1, 1000);
        int n = pv_lane_take(s.lane, items, 4);
        if (n < 0) {
            return NULL;
        }
        for (int i = 0; i < n; i++) {
            CHECK(items[i].reason < PV_LANE_REASONS && (items[i].size == 0) == (items[i].data == NULL));
            CHECK(memchr(items[i].host, 0, sizeof items[i].host) != NULL);
            (void)pv_crc32c(0, items[i].data, items[i].size); /* all of it may be read */
            CHECK_EQ(close(items[i].fd), 0);
            pv_lane_item_free(s.lane, &items[i]);
        }
    }
}

static void new_volume(void) {
    char paths[2][40];
    for (int i = 0; i < 2; i++) {
        s.files[i] = memfd_create("fuzz_lane", MFD_CLOEXEC);
        CHECK(s.files[i] >= 0);
        snprintf(paths[i], sizeof paths[i], "/proc/self/fd/%d", s.files[i]);
    }
    const uint8_t block[PV_SUPERBLOCK] = {3};
    CHECK_EQ(pv__io_pwrite(s.files[0], block, sizeof block, 0, NULL), 0);
    const pv_vol_opts o = {.dat_path = paths[0], .idx_path = paths[1], .vid = 3, .offset_width = 4};
    pv_errinfo err;
    CHECK_EQ(pv_vol_open(&o, &s.vol, &err), 0);
    const pv_needle n = {.id = 1,
                         .cookie = 0xdeadbeef,
                         .flags = PV_F_NAME | PV_F_MIME | PV_F_MTIME,
                         .data = (const uint8_t *)"0123456789",
                         .data_size = 10,
                         .checksum = pv_crc32c(0, (const uint8_t *)"0123456789", 10),
                         .name = (const uint8_t *)"a.txt",
                         .name_size = 5,
                         .mime = (const uint8_t *)"a/b",
                         .mime_size = 3,
                         .last_modified_s = 1700000000};
    pv_write_res written;
    CHECK_EQ(pv_vol_write(s.vol, &n, 0, NULL, &written, &err), 0);
    CHECK_EQ(pv_reg_publish_as(s.reg, 3, s.vol, PV_REG_SINGLE), 0);
}

static void drop_volume(void) {
    CHECK_EQ(pv_reg_withdraw(s.reg, 3), 0);
    CHECK_EQ(pv_vol_close(s.vol, NULL), 0);
    pv_vol_unref(s.vol);
    close(s.files[0]);
    close(s.files[1]);
}

static void end(void) {
    (void)pv_lane_stop(s.lane, 2000);
    CHECK_EQ(pthread_join(s.taker, NULL), 0);
    pv_lane_free(s.lane);
    drop_volume();
    pv_reg_free(s.reg);
    pv_mime_free(s.mime);
}

static void begin(void) {
    CHECK_EQ(pv_reg_new(&s.reg), 0);
    CHECK_EQ(pv_mime_new(&s.mime), 0);
    CHECK_EQ(pv_mime_seal(s.mime), 0);
    new_volume();
    const pv_lane_opts o = {.registry = s.reg,
                            .mime = s.mime,
                            .server = "S",
                            .size_limit_bytes = 4096,
                            .body_bytes = 2048,
                            .budget_bytes = 65536,
                            .threads = 1,
                            .io_threads = 1,
                            .sync_threads = 1,
                            .max_connections = 16,
                            .mailbox = 16,
                            .fix_orientation = 1,
                            .serve = PV_LANE_READS | PV_LANE_WRITES};
    CHECK_EQ(pv_lane_new(&o, &s.lane), 0);
    CHECK_EQ(pv_lane_start(s.lane), 0);
    CHECK_EQ(pthread_create(&s.taker, NULL, taker_main, NULL), 0);
    CHECK_EQ(atexit(end), 0);
}

/* The lane may be done with the connection already: that is no failure of ours. */
static void say(int fd, const uint8_t *p, size_t n) {
    while (n > 0) {
        ssize_t rc = send(fd, p, n, MSG_NOSIGNAL);
        if (rc <= 0) {
            return;
        }
        p += rc;
        n -= (size_t)rc;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len) {
    if (len < 2 || len > 8192) {
        return 0;
    }
    if (s.runs++ == 0) {
        begin();
    } else if (s.runs % PER_VOLUME == 0) {
        drop_volume();
        new_volume();
    }
    size_t cut = pv__get_be16(data);
    data += 2;
    len -= 2;
    int pair[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    const struct timeval patience = {20, 0};
    CHECK_EQ(setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), 0);
    int flags = fcntl(pair[1], F_GETFL);
    CHECK(flags >= 0 && fcntl(pair[1], F_SETFL, flags | O_NONBLOCK) == 0);
    CHECK_EQ(pv_lane_give(s.lane, pair[1], len % 3 == 0 ? PV_LANE_PUBLIC : 0), 0);
    if (cut < len) {
        say(pair[0], data, cut);
        say(pair[0], data + cut, len - cut);
    } else {
        say(pair[0], data, len);
    }
    (void)shutdown(pair[0], SHUT_WR);
    char answer[4096];
    bool first = true;
    for (;;) {
        ssize_t n = recv(pair[0], answer, sizeof answer, 0);
        if (n <= 0) {
            CHECK(n == 0 || errno == ECONNRESET); /* not: nothing came for 20 s */
            break;
        }
        CHECK(!first || n < 9 || memcmp(answer, "HTTP/1.1 ", 9) == 0);
        first = false;
    }
    CHECK_EQ(close(pair[0]), 0);
    return 0;
}
