/* Preloaded into the processes of pods: their wall clock runs ahead of the machine's by what a shared file says.
 *
 * CHAOS_CLOCKS names a file of 64 signed 64-bit integers: seconds, by slot of the gang. The slot is the second number from
 * the end of TRIREME_POD (JOB-SLOT-INCARNATION). Without either, and for every monotonic clock, nothing is changed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 64 };
static const volatile int64_t *offset;
static int (*real_clock_gettime)(clockid_t, struct timespec *);

__attribute__((constructor)) static void begin(void) {
    real_clock_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("CHAOS_CLOCKS"), *pod = getenv("TRIREME_POD");
    if (!path || !pod) return;
    const char *end = strrchr(pod, '-');
    if (!end) return;
    while (end > pod && end[-1] != '-') end--;
    long slot = strtol(end, NULL, 10);
    if (slot < 0 || slot >= SLOTS) return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *map = mmap(NULL, SLOTS * sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (map != MAP_FAILED) offset = (const volatile int64_t *)map + slot;
}

int clock_gettime(clockid_t id, struct timespec *out) {
    if (!real_clock_gettime) begin();
    int code = real_clock_gettime(id, out);
    if (!code && offset && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) out->tv_sec += *offset;
    return code;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now;
    (void)zone;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return code;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
