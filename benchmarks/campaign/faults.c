// A library for LD_PRELOAD: the Nth operation on files below a folder fails, or clocks jump.
//
// FAULT_OPERATION is open, read, write, short (a write that takes half), sync, rename, truncate or
// mmap; FAULT_BELOW the folder; FAULT_AT the number, from 0; FAULT_ERROR the errno; with
// FAULT_STAYS=1 all later ones fail, too. After FAULT_CLOCK_AT readings, the real-time clock is
// FAULT_CLOCK seconds off. The file FAULT_HITS gets the path of each operation that fails. Everything
// is read at each call, for programs are forked.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_long seen, readings;

#define REAL(name) static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name)

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void tell(const char *path) {
    const char *hits = getenv("FAULT_HITS");
    if (!hits) return;
    int fd = syscall(SYS_openat, AT_FDCWD, hits, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd < 0) return;
    char line[2 * PATH_MAX + 2];
    int length = snprintf(line, sizeof line, "%s\n", path);
    syscall(SYS_write, fd, line, length);
    syscall(SYS_close, fd);
}

static int fails_at(const char *operation, const char *path) {
    const char *wanted = getenv("FAULT_OPERATION"), *below = getenv("FAULT_BELOW");
    if (!wanted || !below || strcmp(wanted, operation)) return 0;
    char whole[2 * PATH_MAX];
    if (path[0] != '/' && getcwd(whole, PATH_MAX)) {
        strcat(whole, "/");
        strncat(whole, path, PATH_MAX - 1);
        path = whole;
    }
    if (strncmp(path, below, strlen(below))) return 0;
    long count = atomic_fetch_add(&seen, 1), at = number("FAULT_AT", 0);
    if (count != at && !(count > at && number("FAULT_STAYS", 0))) return 0;
    tell(path);
    errno = number("FAULT_ERROR", EIO);
    return 1;
}

static int fails(const char *operation, int fd) {
    if (!getenv("FAULT_OPERATION")) return 0;
    char link[40], path[PATH_MAX];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0 || path[0] != '/') return 0;  // a pipe or a socket has no path
    path[length] = 0;
    return fails_at(operation, path);
}

#define OPEN(name)                                                                   \
    int name(const char *path, int flags, ...) {                                     \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        REAL(name);                                                                  \
        return fails_at("open", path) ? -1 : real(path, flags, mode);                \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                 \
    int name(int folder, const char *path, int flags, ...) {                         \
        va_list more; va_start(more, flags); int mode = va_arg(more, int); va_end(more); \
        REAL(name);                                                                  \
        return fails_at("open", path) ? -1 : real(folder, path, flags, mode);        \
    }
OPENAT(openat)
OPENAT(openat64)

#define WRITE(name, declared, given)                       \
    ssize_t name declared {                                       \
        REAL(name);                                               \
        if (fails("write", fd)) return -1;                        \
        if (size > 1 && fails("short", fd)) size /= 2;            \
        return real given;                                        \
    }
WRITE(write, (int fd, const void *data, size_t size), (fd, data, size))
WRITE(pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
WRITE(pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))

#define FAILING(operation, fd, result, name, declared, given)     \
    result name declared {                                        \
        REAL(name);                                               \
        return fails(operation, fd) ? (result)-1 : real given;    \
    }
FAILING("read", fd, ssize_t, read, (int fd, void *data, size_t size), (fd, data, size))
FAILING("read", fd, ssize_t, pread, (int fd, void *data, size_t size, off_t at), (fd, data, size, at))
FAILING("read", fd, ssize_t, pread64, (int fd, void *data, size_t size, off64_t at), (fd, data, size, at))
FAILING("sync", fd, int, fsync, (int fd), (fd))
FAILING("sync", fd, int, fdatasync, (int fd), (fd))
FAILING("truncate", fd, int, ftruncate, (int fd, off_t size), (fd, size))
FAILING("truncate", fd, int, ftruncate64, (int fd, off64_t size), (fd, size))
FAILING("mmap", fd, void *, mmap, (void *to, size_t size, int may, int flags, int fd, off_t at), (to, size, may, flags, fd, at))
FAILING("mmap", fd, void *, mmap64, (void *to, size_t size, int may, int flags, int fd, off64_t at), (to, size, may, flags, fd, at))

int rename(const char *from, const char *to) {
    REAL(rename);
    return fails_at("rename", to) ? -1 : real(from, to);
}

static long jump(void) {
    const char *text = getenv("FAULT_CLOCK");
    long at = number("FAULT_CLOCK_AT", 0), count = text ? atomic_fetch_add(&readings, 1) : -1;
    if (count < at) return 0;
    if (count == at) tell("the clock");
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *to) {
    REAL(clock_gettime);
    int result = real(clock, to);
    if (!result && clock == CLOCK_REALTIME) to->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict to, void *restrict zone) {
    REAL(gettimeofday);
    int result = real(to, zone);
    if (!result) to->tv_sec += jump();
    return result;
}

time_t time(time_t *to) {
    REAL(time);
    time_t now = real(NULL) + jump();
    if (to) *to = now;
    return now;
}
