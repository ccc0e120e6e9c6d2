/* Sees every system call with which this process changes files below one folder: writes it into a log, in order and
 * with its data, and lets a chosen one fail.
 *
 * A seccomp filter turns those calls into SIGSYS, whoever makes them: the C library, or code that goes past it, as the
 * tensor library does to rename. The handler carries the call out, marked in its sixth argument, which no such call
 * uses, so that the filter lets it through. No filter can be removed again: use a process of its own, which starts no
 * other programs. Between `shim_stop` and `shim_start` all calls pass unseen.
 *
 * What it does not see: shared mappings that are written to. Replaying a log and comparing with the folder shows that
 * there are none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/fs.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#error "registers of this processor are not known here"
#endif

#define MARK 0x76a3c95ed1b8f042ULL
#define LOG_BYTES (1ULL << 32) /* reserved, not used */
#define CHUNK_BYTES (1 << 20)
#define SHORT_WRITE (-1)

enum kind { CREATE, TRUNCATE, WRITE, SYNC, RENAME, EXCHANGE, UNLINK, MKDIR, RMDIR, LINK, SYMLINK, CHMOD, ALLOCATE };

/* One operation; its two names and its data follow. `size`: new length, or mode. */
struct entry {
    int64_t kind, error, inode, folder, to_folder, offset, size, name_bytes, to_name_bytes, data_bytes;
};

struct place {
    int descriptor; /* of the folder */
    int64_t folder; /* its inode */
    char name[NAME_MAX + 1];
};

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char *operations;
static char chunk[CHUNK_BYTES];
static volatile int is_active;
static char root[PATH_MAX];
static size_t used;
static long count, fault_at, fault_error;
static int is_for_good, can_exchange;

static long marked(long number, long a, long b, long c, long d, long e) {
    long result = syscall(number, a, b, c, d, e, MARK);
    return result < 0 ? -errno : result;
}

/* Whether a path is the root or below it. */
static int is_below(const char *path) {
    size_t length = strlen(root);
    return strncmp(path, root, length) == 0 && (path[length] == '\0' || path[length] == '/');
}

static int is_inside(int descriptor) {
    char name[32] = "/proc/self/fd/", digits[16], path[PATH_MAX];
    int end = 0, start = (int)strlen(name);
    if (descriptor < 0) return 0;
    do digits[end++] = (char)('0' + descriptor % 10); while ((descriptor /= 10) > 0);
    while (end > 0) name[start++] = digits[--end];
    name[start] = '\0';
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = '\0';
    return is_below(path);
}

static int64_t inode_of(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) == 0 ? (int64_t)status.st_ino : -1;
}

/* Find folder and name of a path; true if the folder lies in the root. The caller closes the descriptor. */
static int find(int at, const char *path, struct place *place) {
    char folder[PATH_MAX];
    size_t length = strlen(path);
    place->descriptor = -1;
    while (length > 1 && path[length - 1] == '/') length--;
    size_t start = length;
    while (start > 0 && path[start - 1] != '/') start--;
    if (length == 0 || length >= sizeof folder || length - start > NAME_MAX) return 0;
    memcpy(place->name, path + start, length - start);
    place->name[length - start] = '\0';
    if (start == 0) strcpy(folder, ".");
    else { memcpy(folder, path, start); folder[start] = '\0'; }
    place->descriptor = (int)marked(SYS_openat, at, (long)folder, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, 0);
    place->folder = inode_of(place->descriptor);
    return is_inside(place->descriptor);
}

static void leave(struct place *place) {
    if (place->descriptor >= 0) close(place->descriptor);
}

/* Number the operation; the error with which it must fail, or 0. */
static long next_fault(int needs_space) {
    long number = count++;
    int is_hit = fault_at >= 0 && (number == fault_at || (is_for_good && number > fault_at && needs_space));
    return is_hit ? fault_error : 0;
}

static void note(struct entry entry, const char *name, const char *to_name, const void *data) {
    const void *parts[] = {&entry, name, to_name, data};
    entry.name_bytes = name ? (int64_t)strlen(name) : 0;
    entry.to_name_bytes = to_name ? (int64_t)strlen(to_name) : 0;
    size_t sizes[] = {sizeof entry, (size_t)entry.name_bytes, (size_t)entry.to_name_bytes, (size_t)entry.data_bytes};
    if (used + sizes[0] + sizes[1] + sizes[2] + sizes[3] > LOG_BYTES) abort();
    for (int part = 0; part < 4; part++) {
        if (sizes[part]) memcpy(operations + used, parts[part], sizes[part]);
        used += sizes[part];
    }
}

static long error_of(long result) { return result < 0 ? -result : 0; }

static long open_file(int at, const char *path, int flags, long mode) {
    struct place place;
    struct stat before, after;
    if (!(flags & (O_CREAT | O_TRUNC)) || !find(at, path, &place)) {
        if (flags & (O_CREAT | O_TRUNC)) leave(&place);
        return marked(SYS_openat, at, (long)path, flags, mode, 0);
    }
    pthread_mutex_lock(&turn);
    int exists = fstatat(place.descriptor, place.name, &before, 0) == 0;
    int is_cut = exists && (flags & O_TRUNC) && !(flags & O_EXCL) && S_ISREG(before.st_mode) && before.st_size > 0;
    int is_made = !exists && (flags & O_CREAT);
    long result;
    if (!is_cut && !is_made) result = marked(SYS_openat, at, (long)path, flags, mode, 0);
    else {
        long error = next_fault(is_made);
        if (error == SHORT_WRITE) error = 0;
        result = error ? -error : marked(SYS_openat, at, (long)path, flags, mode, 0);
        struct entry entry = {.kind = is_made ? CREATE : TRUNCATE, .error = error_of(result), .folder = place.folder};
        if (result >= 0 && fstat((int)result, &after) == 0) {
            entry.inode = (int64_t)after.st_ino;
            entry.size = is_made ? after.st_mode & 07777 : 0;
        }
        note(entry, place.name, NULL, NULL);
    }
    pthread_mutex_unlock(&turn);
    leave(&place);
    return result;
}

/* Write at an offset, or at the current one (-1). The caller holds the turn. */
static long write_locked(int descriptor, const char *data, size_t length, int64_t offset) {
    int is_at = offset >= 0;
    struct stat status;
    fstat(descriptor, &status);
    if (!is_at) offset = fcntl(descriptor, F_GETFL) & O_APPEND ? status.st_size : lseek(descriptor, 0, SEEK_CUR);
    long error = next_fault(1);
    if (error == SHORT_WRITE && length > 1) length /= 2;
    long result;
    if (error > 0) result = -error;
    else if (is_at) result = marked(SYS_pwrite64, descriptor, (long)data, (long)length, offset, 0);
    else result = marked(SYS_write, descriptor, (long)data, (long)length, 0, 0);
    struct entry entry = {.kind = WRITE, .error = error_of(result), .inode = (int64_t)status.st_ino,
                          .offset = offset, .size = (int64_t)length, .data_bytes = result > 0 ? result : 0};
    note(entry, NULL, NULL, data);
    return result;
}

static long write_file(int descriptor, const char *data, size_t length, int64_t offset) {
    pthread_mutex_lock(&turn);
    long result = write_locked(descriptor, data, length, offset);
    pthread_mutex_unlock(&turn);
    return result;
}

/* Several buffers: a part of them is an answer that every caller must expect, so the first one that is not empty. */
static long write_buffers(int descriptor, const struct iovec *buffers, int number, int64_t offset) {
    for (int each = 0; each < number; each++)
        if (buffers[each].iov_len) return write_file(descriptor, buffers[each].iov_base, buffers[each].iov_len, offset);
    return 0;
}

/* From file to file, a part at a time. */
static long copy(int from, int64_t *from_offset, int to, int64_t *to_offset, size_t length) {
    pthread_mutex_lock(&turn);
    if (length > CHUNK_BYTES) length = CHUNK_BYTES;
    int64_t start = from_offset ? *from_offset : lseek(from, 0, SEEK_CUR);
    long result = pread(from, chunk, length, start);
    if (result < 0) result = -errno;
    if (result > 0) result = write_locked(to, chunk, (size_t)result, to_offset ? *to_offset : -1);
    if (result > 0) {
        if (from_offset) *from_offset += result;
        else lseek(from, start + result, SEEK_SET);
        if (to_offset) *to_offset += result;
    }
    pthread_mutex_unlock(&turn);
    return result;
}

/* What changes an open file and no name. */
static long change_file(int descriptor, struct entry entry, int needs_space, long number, const long *a) {
    pthread_mutex_lock(&turn);
    long error = next_fault(needs_space);
    entry.inode = inode_of(descriptor);
    long result = error > 0 ? -error : entry.kind == SYNC ? 0 : marked(number, a[0], a[1], a[2], a[3], a[4]);
    entry.error = error_of(result);
    note(entry, NULL, NULL, NULL);
    pthread_mutex_unlock(&turn);
    return result;
}

static long change_mode(int at, const char *path, long mode, long number, const long *a) {
    struct place place;
    struct stat status;
    long result;
    if (!find(at, path, &place)) result = marked(number, a[0], a[1], a[2], a[3], a[4]);
    else {
        pthread_mutex_lock(&turn);
        long error = next_fault(0);
        result = error > 0 ? -error : marked(number, a[0], a[1], a[2], a[3], a[4]);
        struct entry entry = {.kind = CHMOD, .error = error_of(result), .folder = place.folder, .size = mode & 07777};
        if (fstatat(place.descriptor, place.name, &status, 0) == 0) entry.inode = (int64_t)status.st_ino;
        note(entry, place.name, NULL, NULL);
        pthread_mutex_unlock(&turn);
    }
    leave(&place);
    return result;
}

/* What makes or removes one name. `from`: of what a link leads to, which `at` and `path` then name. */
static long change_name(enum kind kind, int at, const char *path, const char *target, long number, const long *a) {
    struct place place;
    struct stat status = {0};
    long result;
    if (!find(at, path, &place)) result = marked(number, a[0], a[1], a[2], a[3], a[4]);
    else {
        pthread_mutex_lock(&turn);
        int is_made = kind == MKDIR || kind == SYMLINK || kind == LINK;
        long error = next_fault(is_made);
        if (!is_made) fstatat(place.descriptor, place.name, &status, AT_SYMLINK_NOFOLLOW);
        result = error > 0 ? -error : marked(number, a[0], a[1], a[2], a[3], a[4]);
        if (is_made) fstatat(place.descriptor, place.name, &status, AT_SYMLINK_NOFOLLOW);
        struct entry entry = {.kind = kind, .error = error_of(result), .inode = (int64_t)status.st_ino,
                              .folder = place.folder, .size = status.st_mode & 07777};
        if (target) entry.data_bytes = (int64_t)strlen(target);
        note(entry, place.name, NULL, target);
        pthread_mutex_unlock(&turn);
    }
    leave(&place);
    return result;
}

static long rename_entry(int at, const char *path, int to_at, const char *to_path, unsigned flags) {
    struct place from, to;
    struct stat status = {0};
    long result, arguments[] = {at, (long)path, to_at, (long)to_path, flags};
    int is_seen = find(at, path, &from);
    is_seen |= find(to_at, to_path, &to);
    if (!is_seen) result = marked(SYS_renameat2, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4]);
    else {
        pthread_mutex_lock(&turn);
        long error = next_fault(0);
        if (error <= 0 && (flags & RENAME_EXCHANGE) && !can_exchange) error = EINVAL;
        fstatat(from.descriptor, from.name, &status, AT_SYMLINK_NOFOLLOW);
        result = error > 0 ? -error : marked(SYS_renameat2, arguments[0], arguments[1], arguments[2], arguments[3], flags);
        struct entry entry = {.kind = flags & RENAME_EXCHANGE ? EXCHANGE : RENAME, .error = error_of(result),
                              .inode = (int64_t)status.st_ino, .folder = from.folder, .to_folder = to.folder};
        note(entry, from.name, to.name, NULL);
        pthread_mutex_unlock(&turn);
    }
    leave(&from);
    leave(&to);
    return result;
}

/* Carry a call out. a: its arguments. */
static long carry_out(long number, long *a) {
    struct entry resized = {.kind = TRUNCATE, .size = a[1]}, moded = {.kind = CHMOD, .size = a[1] & 07777};
    struct entry allocated = {.kind = ALLOCATE, .size = a[2] + a[3]}, synced = {.kind = SYNC};
    int is_seen = is_active;
    switch (number) {
#ifdef SYS_open /* older processors have both forms of most calls */
    case SYS_open: if (is_seen) return open_file(AT_FDCWD, (char *)a[0], (int)a[1], a[2]); break;
    case SYS_creat: if (is_seen) return open_file(AT_FDCWD, (char *)a[0], O_CREAT | O_WRONLY | O_TRUNC, a[1]); break;
    case SYS_rename: if (is_seen) return rename_entry(AT_FDCWD, (char *)a[0], AT_FDCWD, (char *)a[1], 0); break;
    case SYS_unlink: if (is_seen) return change_name(UNLINK, AT_FDCWD, (char *)a[0], NULL, number, a); break;
    case SYS_rmdir: if (is_seen) return change_name(RMDIR, AT_FDCWD, (char *)a[0], NULL, number, a); break;
    case SYS_mkdir: if (is_seen) return change_name(MKDIR, AT_FDCWD, (char *)a[0], NULL, number, a); break;
    case SYS_link: if (is_seen) return change_name(LINK, AT_FDCWD, (char *)a[1], NULL, number, a); break;
    case SYS_symlink: if (is_seen) return change_name(SYMLINK, AT_FDCWD, (char *)a[1], (char *)a[0], number, a); break;
    case SYS_chmod: if (is_seen) return change_mode(AT_FDCWD, (char *)a[0], a[1], number, a); break;
#endif
#ifdef SYS_renameat
    case SYS_renameat: if (is_seen) return rename_entry((int)a[0], (char *)a[1], (int)a[2], (char *)a[3], 0); break;
#endif
    case SYS_openat: if (is_seen) return open_file((int)a[0], (char *)a[1], (int)a[2], a[3]); break;
    case SYS_renameat2:
        if (is_seen) return rename_entry((int)a[0], (char *)a[1], (int)a[2], (char *)a[3], (unsigned)a[4]);
        break;
    case SYS_unlinkat:
        if (is_seen) return change_name(a[2] & AT_REMOVEDIR ? RMDIR : UNLINK, (int)a[0], (char *)a[1], NULL, number, a);
        break;
    case SYS_mkdirat: if (is_seen) return change_name(MKDIR, (int)a[0], (char *)a[1], NULL, number, a); break;
    case SYS_linkat: if (is_seen) return change_name(LINK, (int)a[2], (char *)a[3], NULL, number, a); break;
    case SYS_symlinkat:
        if (is_seen) return change_name(SYMLINK, (int)a[1], (char *)a[2], (char *)a[0], number, a);
        break;
    case SYS_fchmodat: if (is_seen) return change_mode((int)a[0], (char *)a[1], a[2], number, a); break;
    case SYS_fchmod: if (is_seen && is_inside((int)a[0])) return change_file((int)a[0], moded, 0, number, a); break;
    case SYS_ftruncate: if (is_seen && is_inside((int)a[0])) return change_file((int)a[0], resized, 1, number, a); break;
    case SYS_fallocate: if (is_seen && is_inside((int)a[0])) return change_file((int)a[0], allocated, 1, number, a); break;
    case SYS_fsync:
    case SYS_fdatasync: if (is_seen && is_inside((int)a[0])) return change_file((int)a[0], synced, 0, number, a); break;
    case SYS_write:
        if (is_seen && is_inside((int)a[0])) return write_file((int)a[0], (char *)a[1], (size_t)a[2], -1);
        break;
    case SYS_pwrite64:
        if (is_seen && is_inside((int)a[0])) return write_file((int)a[0], (char *)a[1], (size_t)a[2], a[3]);
        break;
    case SYS_writev:
        if (is_seen && is_inside((int)a[0])) return write_buffers((int)a[0], (struct iovec *)a[1], (int)a[2], -1);
        break;
    case SYS_pwritev:
        if (is_seen && is_inside((int)a[0])) return write_buffers((int)a[0], (struct iovec *)a[1], (int)a[2], a[3]);
        break;
    case SYS_sendfile:
        if (is_seen && is_inside((int)a[0])) return copy((int)a[1], (int64_t *)a[2], (int)a[0], NULL, (size_t)a[3]);
        break;
    case SYS_copy_file_range: /* uses its sixth argument; callers know systems without it */
        return -ENOSYS;
    }
    return marked(number, a[0], a[1], a[2], a[3], a[4]);
}

static void on_call(int signal, siginfo_t *call, void *context) {
    int before = errno;
    (void)signal;
#if defined(__x86_64__)
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    long arguments[] = {registers[REG_RDI], registers[REG_RSI], registers[REG_RDX], registers[REG_R10], registers[REG_R8]};
    registers[REG_RAX] = carry_out(call->si_syscall, arguments);
#else
    unsigned long long *registers = ((ucontext_t *)context)->uc_mcontext.regs;
    long arguments[] = {registers[0], registers[1], registers[2], registers[3], registers[4]};
    registers[0] = carry_out(call->si_syscall, arguments);
#endif
    errno = before;
}

static const int SEEN[] = {
#ifdef SYS_open
    SYS_open, SYS_creat, SYS_rename, SYS_unlink, SYS_rmdir, SYS_mkdir, SYS_link, SYS_symlink, SYS_chmod,
#endif
#ifdef SYS_renameat
    SYS_renameat,
#endif
    SYS_openat, SYS_renameat2, SYS_unlinkat, SYS_mkdirat, SYS_linkat, SYS_symlinkat, SYS_fchmodat, SYS_fchmod,
    SYS_ftruncate, SYS_fallocate, SYS_fsync, SYS_fdatasync, SYS_write, SYS_pwrite64, SYS_writev, SYS_pwritev,
    SYS_sendfile, SYS_copy_file_range,
};
#define NUM_SEEN (sizeof SEEN / sizeof *SEEN)

/* Trap the calls, in all threads, for the rest of the process. Returns 0 or an error number. */
int shim_install(void) {
    struct sock_filter filter[8 + 2 * NUM_SEEN + 1], *next = filter;
    operations = mmap(NULL, LOG_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (operations == MAP_FAILED) return errno;
    struct sigaction action = {.sa_sigaction = on_call, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_RESTART};
    if (sigaction(SIGSYS, &action, NULL)) return errno;
#define LOAD(field) (struct sock_filter) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define UNLESS(value, skipped) (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (value), 0, (skipped))
#define RETURN(verdict) (struct sock_filter) BPF_STMT(BPF_RET | BPF_K, (verdict))
    *next++ = LOAD(arch);
    *next++ = (struct sock_filter) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0);
    *next++ = RETURN(SECCOMP_RET_ALLOW);
    *next++ = LOAD(args[5]); /* its low half: both processors are little-endian */
    *next++ = UNLESS((uint32_t)MARK, 1);
    *next++ = RETURN(SECCOMP_RET_ALLOW);
    *next++ = LOAD(nr);
    for (size_t each = 0; each < NUM_SEEN; each++) {
        *next++ = UNLESS(SEEN[each], 1);
        *next++ = RETURN(SECCOMP_RET_TRAP);
    }
    *next++ = RETURN(SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = (unsigned short)(next - filter), .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return errno;
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC | SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) ? errno : 0;
}

/* Start a log of what happens below `folder`, where nothing is really synced: no power fails. The operation with number `at` (-1: none) fails with `error`, or is a
 * write of half its bytes (-1); for_good: so does every later one that takes space on the disk. */
void shim_start(const char *folder, long at, long error, int for_good, int exchange) {
    pthread_mutex_lock(&turn);
    strncpy(root, folder, sizeof root - 1);
    used = 0;
    count = 0;
    fault_at = at;
    fault_error = error;
    is_for_good = for_good;
    can_exchange = exchange;
    is_active = 1;
    pthread_mutex_unlock(&turn);
}

/* How many operations there have been. */
long shim_count(void) { return count; }

/* Stop; returns the log and stores its length. */
const char *shim_stop(size_t *length) {
    pthread_mutex_lock(&turn);
    is_active = 0;
    *length = used;
    pthread_mutex_unlock(&turn);
    return operations;
}
