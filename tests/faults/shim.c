/* LD_PRELOAD: counts the calls that change files under one directory, and lets the k-th of them fail.
 *
 * Python, the C++ of torch and onnxruntime and the Rust of safetensors all write through these functions of libc, so
 * one place is enough. Not seen: what libc does inside itself (fwrite of a FILE, but its fopen is), stores into mapped
 * memory, and functions that were looked up in a handle of libc.so.6 rather than in the whole process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { SPACE = 1, REMOVAL = 2, ATTRIBUTE = 4 };            /* kinds of calls, as a mask */
enum { ONCE, STAYING, KILLED, STOPPED, INTERRUPTED };      /* what happens at the k-th */

static char prefix[PATH_MAX];
static size_t prefix_length;
static long fault_k;
static int fault_mode, fault_error, fault_kinds, no_exchange, log_fd = -1;
static atomic_long count;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static ssize_t plain_write(int fd, const void *data, size_t size) {
    REAL(write);
    return real(fd, data, size);
}

/* Arm: paths under `directory`, the k-th call of `kinds` (0 for none, only count), its mode and errno, and a log.
 * `plain` for a file system that has no renameat2. */
void fault_arm(const char *directory, long k, int mode, int error, int kinds, const char *log, int plain) {
    REAL(open);
    int fd = real(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    log_fd = fcntl(fd, F_DUPFD_CLOEXEC, 700); /* out of the way of whoever expects the next free number */
    close(fd);
    fault_k = k, fault_mode = mode, fault_error = error, fault_kinds = kinds, no_exchange = plain, count = 0;
    snprintf(prefix, sizeof prefix, "%s", directory);
    prefix_length = strlen(prefix);
}

void fault_disarm(void) { prefix_length = 0; }

long fault_count(void) { return count; }

static int under(const char *path) {
    return !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}

static void path_of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void path_at(int directory, const char *name, char *path) {
    char parent[PATH_MAX] = "";
    if (!name || name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name ? name : "");
        return;
    }
    if (directory == AT_FDCWD) {
        if (!getcwd(parent, sizeof parent)) parent[0] = 0;
    } else {
        path_of_fd(directory, parent);
    }
    if (snprintf(path, PATH_MAX, "%s/%s", parent, name) >= PATH_MAX) path[0] = 0;
}

/* Count a call; -1 and errno if it must fail. */
static int fault(const char *call, int kind, const char *path, const char *target) {
    if (!prefix_length || !(kind & fault_kinds) || !(under(path) || under(target))) return 0;
    int saved = errno, failed = 0;
    long number = ++count;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, call, path, target);
    plain_write(log_fd, line, length);
    if (fault_k && number == fault_k && fault_mode == KILLED) kill(getpid(), SIGKILL), pause();
    if (fault_k && number == fault_k && fault_mode == STOPPED) kill(getpid(), SIGSTOP);
    if (fault_k && number == fault_k && fault_mode == INTERRUPTED) kill(getpid(), SIGINT);
    if (fault_k && (number == fault_k ? fault_mode <= STAYING : number > fault_k && fault_mode == STAYING)) failed = 1;
    errno = failed ? fault_error : saved;
    return failed ? -1 : 0;
}

static int fault_fd(const char *call, int kind, int fd) {
    char path[PATH_MAX];
    if (!prefix_length) return 0;
    path_of_fd(fd, path);
    return fault(call, kind, path, "");
}

static int fault_at(const char *call, int kind, int directory, const char *name) {
    char path[PATH_MAX];
    if (!prefix_length) return 0;
    path_at(directory, name, path);
    return fault(call, kind, path, "");
}

static int fault_two(const char *call, int from, const char *name, int to, const char *other) {
    char path[PATH_MAX], target[PATH_MAX];
    if (!prefix_length) return 0;
    path_at(from, name, path);
    path_at(to, other, target);
    return fault(call, SPACE, path, target);
}

static int changes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC)); }

#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        if (changes(flags) && fault_at("open", SPACE, AT_FDCWD, path)) return -1; \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        REAL(name); \
        MODE_OF(flags) \
        if (changes(flags) && fault_at("open", SPACE, directory, path)) return -1; \
        return real(directory, path, flags, mode); \
    }
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        if (strpbrk(mode, "wa+") && fault_at("open", SPACE, AT_FDCWD, path)) return NULL; \
        return real(path, mode); \
    }
/* A call on one fd, on one path, on a path in a directory. */
#define ON_FD(type, name, kind, parameters, arguments) \
    type name parameters { \
        REAL(name); \
        if (fault_fd(#name, kind, fd)) return -1; \
        return real arguments; \
    }
#define ON_PATH(name, kind, directory, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        if (fault_at(#name, kind, directory, path)) return -1; \
        return real arguments; \
    }
#define ON_TWO(name, from, to, parameters, arguments) \
    int name parameters { \
        REAL(name); \
        if (fault_two(#name, from, path, to, target)) return -1; \
        return real arguments; \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)
ON_PATH(creat, SPACE, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_FD(ssize_t, write, SPACE, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(ssize_t, pwrite, SPACE, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(ssize_t, pwrite64, SPACE, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FD(ssize_t, writev, SPACE, (int fd, const struct iovec *parts, int number), (fd, parts, number))
ON_FD(ssize_t, sendfile, SPACE, (int fd, int from, off_t *at, size_t size), (fd, from, at, size))
ON_FD(ssize_t, sendfile64, SPACE, (int fd, int from, off64_t *at, size_t size), (fd, from, at, size))
ON_FD(int, fsync, SPACE, (int fd), (fd))
ON_FD(int, fdatasync, SPACE, (int fd), (fd))
ON_FD(int, ftruncate, SPACE, (int fd, off_t size), (fd, size))
ON_FD(int, ftruncate64, SPACE, (int fd, off64_t size), (fd, size))
ON_FD(int, fallocate, SPACE, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size))
ON_FD(int, fallocate64, SPACE, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size))
ON_FD(int, fchmod, ATTRIBUTE, (int fd, mode_t mode), (fd, mode))
ON_PATH(mkdir, SPACE, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, SPACE, directory, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_PATH(unlink, REMOVAL, AT_FDCWD, (const char *path), (path))
ON_PATH(unlinkat, REMOVAL, directory, (int directory, const char *path, int flags), (directory, path, flags))
ON_PATH(rmdir, REMOVAL, AT_FDCWD, (const char *path), (path))
ON_PATH(chmod, ATTRIBUTE, AT_FDCWD, (const char *path, mode_t mode), (path, mode))
ON_PATH(fchmodat, ATTRIBUTE, directory, (int directory, const char *path, mode_t mode, int flags),
        (directory, path, mode, flags))
ON_TWO(rename, AT_FDCWD, AT_FDCWD, (const char *path, const char *target), (path, target))
ON_TWO(renameat, from, to, (int from, const char *path, int to, const char *target), (from, path, to, target))
ON_TWO(link, AT_FDCWD, AT_FDCWD, (const char *path, const char *target), (path, target))
ON_TWO(linkat, from, to, (int from, const char *path, int to, const char *target, int flags),
       (from, path, to, target, flags))

static int fault_exchange(int from, const char *path, int to, const char *target, unsigned int flags) {
    if (no_exchange && flags) {
        errno = EINVAL;
        return -1;
    }
    return fault_two("renameat2", from, path, to, target);
}

int renameat2(int from, const char *path, int to, const char *target, unsigned int flags) {
    REAL(renameat2);
    return fault_exchange(from, path, to, target, flags) ? -1 : real(from, path, to, target, flags);
}

/* What a link points to is no path that changes. */
int symlink(const char *text, const char *path) {
    REAL(symlink);
    return fault_at("symlink", SPACE, AT_FDCWD, path) ? -1 : real(text, path);
}

int symlinkat(const char *text, int directory, const char *path) {
    REAL(symlinkat);
    return fault_at("symlinkat", SPACE, directory, path) ? -1 : real(text, directory, path);
}

ssize_t copy_file_range(int from, off64_t *at, int fd, off64_t *to, size_t size, unsigned int flags) {
    REAL(copy_file_range);
    return fault_fd("copy_file_range", SPACE, fd) ? -1 : real(from, at, fd, to, size, flags);
}

int posix_fallocate(int fd, off_t at, off_t size) {
    REAL(posix_fallocate);
    return fault_fd("posix_fallocate", SPACE, fd) ? errno : real(fd, at, size);
}

int posix_fallocate64(int fd, off64_t at, off64_t size) {
    REAL(posix_fallocate64);
    return fault_fd("posix_fallocate64", SPACE, fd) ? errno : real(fd, at, size);
}

/* A C library without renameat2 is called by number. */
long syscall(long number, ...) {
    REAL(syscall);
    long given[6];
    va_list rest;
    va_start(rest, number);
    for (int index = 0; index < 6; index++) given[index] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_renameat2 &&
        fault_exchange((int)given[0], (const char *)given[1], (int)given[2], (const char *)given[3], (unsigned)given[4]))
        return -1;
    return real(number, given[0], given[1], given[2], given[3], given[4], given[5]);
}
