/* A disk that fails, for LD_PRELOAD: the libc calls that change what is on a disk, counted, and refused from one on.

   Only what lies below a folder counts. Python, Rust and C++ all come by here. gcc -shared -fPIC -o x.so this.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static volatile int count, first = -1, last, number;

/* Calls first to last (counted from 0) below `below` fail with `error`; none with first < 0. */
void disk_fails(const char *below, int first_call, int last_call, int error) {
    first = -1;
    snprintf(folder, sizeof folder, "%s", below);
    count = 0, last = last_call, number = error;
    first = first_call;
}

int disk_calls(void) { return count; }

static int fails(const char *path) {
    if (!folder[0] || !path || strncmp(path, folder, strlen(folder))) return 0;
    int call = __sync_fetch_and_add(&count, 1);
    if (first < 0 || call < first || call > last) return 0;
    errno = number;
    return 1;
}

static int fails_of(int descriptor) {
    char link[64], path[4096];
    int kept = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (size <= 0) return 0;
    path[size] = 0;
    return fails(path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT))

int open(const char *path, int flags, ...) {
    REAL(open); MODE(flags);
    return WRITES(flags) && fails(path) ? -1 : real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(open64); MODE(flags);
    return WRITES(flags) && fails(path) ? -1 : real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(openat); MODE(flags);
    return WRITES(flags) && fails(path) ? -1 : real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(openat64); MODE(flags);
    return WRITES(flags) && fails(path) ? -1 : real(at, path, flags, mode);
}

/* As a disk that is full does, the first write that fails takes half of what it gets. */
static size_t taken(int failed, size_t size) { return failed && count - 1 == first && size > 1 ? size / 2 : 0; }

#define WRITE(...) \
    int failed = fails_of(fd); \
    size_t half = taken(failed, size); \
    if (half) size = half; \
    return failed && !half ? -1 : real(__VA_ARGS__)

ssize_t write(int fd, const void *data, size_t size) { REAL(write); WRITE(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { REAL(pwrite); WRITE(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { REAL(pwrite64); WRITE(fd, data, size, at); }
ssize_t writev(int fd, const struct iovec *data, int parts) {
    REAL(writev); return fails_of(fd) ? -1 : real(fd, data, parts);
}
int fsync(int fd) { REAL(fsync); return fails_of(fd) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return fails_of(fd) ? -1 : real(fd); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); return fails(path) ? -1 : real(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { REAL(mkdirat); return fails(path) ? -1 : real(at, path, mode); }
int rename(const char *from, const char *to) { REAL(rename); return fails(to) ? -1 : real(from, to); }
int renameat(int at, const char *from, int to_at, const char *to) {
    REAL(renameat); return fails(to) ? -1 : real(at, from, to_at, to);
}
