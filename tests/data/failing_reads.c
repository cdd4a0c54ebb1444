/* A disk that fails, for one process: reads of files under $FAIL_UNDER end with EIO while $FAIL_WHEN exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int fails(int file) {
    const char *under = getenv("FAIL_UNDER"), *when = getenv("FAIL_WHEN");
    char link[64], path[4096];
    ssize_t length;
    if (!under || !when || access(when, F_OK)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return !strncmp(path, under, strlen(under));
}

#define FAILING(type, name, arguments, call)                       \
    type name arguments {                                          \
        static type(*real) arguments;                              \
        if (!real) real = (type(*) arguments)dlsym(RTLD_NEXT, #name); \
        if (fails(file)) { errno = EIO; return -1; }               \
        return real call;                                          \
    }

FAILING(ssize_t, pread, (int file, void *to, size_t size, off_t at), (file, to, size, at))
FAILING(ssize_t, pread64, (int file, void *to, size_t size, off64_t at), (file, to, size, at))
FAILING(ssize_t, read, (int file, void *to, size_t size), (file, to, size))
