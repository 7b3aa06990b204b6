/* replay.c - runs a fuzz target over files, without libFuzzer: every file of the directories given, and every file cut
 * off after each of its bytes (up to CUTS_MAX), always with the last byte at a guard page. A directory that does not
 * exist is passed over. */
#include "../test/t.h"

#include <dirent.h>
#include <sys/stat.h>

#define INPUT_MAX (1U << 20)
#define CUTS_MAX 512U

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

static uint8_t input[INPUT_MAX];

static unsigned replay_dir(const char *dir, t_guard *guard) {
    unsigned files = 0;
    DIR *d = opendir(dir);
    if (d == NULL) {
        CHECK(errno == ENOENT);
        return 0;
    }
    const struct dirent *e;
    while ((e = readdir(d)) != NULL) {
        char path[1024];
        struct stat st;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        if (stat(path, &st) != 0 || !S_ISREG(st.st_mode)) {
            continue;
        }
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        CHECK(fd >= 0);
        size_t len;
        CHECK_EQ(pv__io_pread(fd, input, sizeof input, 0, &len, NULL), 0);
        close(fd);
        (void)LLVMFuzzerTestOneInput(t_guard_put(guard, input, len), len);
        for (size_t cut = 0; cut < len && cut < CUTS_MAX; cut++) {
            (void)LLVMFuzzerTestOneInput(t_guard_put(guard, input, cut), cut);
        }
        files++;
    }
    closedir(d);
    return files;
}

int main(int argc, char **argv) {
    t_guard guard = t_guard_new(INPUT_MAX);
    unsigned files = 0;
    for (int i = 1; i < argc; i++) {
        files += replay_dir(argv[i], &guard);
    }
    t_guard_free(&guard);
    printf("%s: %u inputs replayed\n", argv[0], files);
    /* A target without any input would test nothing. */
    CHECK(files > 0);
    return 0;
}
