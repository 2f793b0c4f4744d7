/* What pyfuse3 leaves out of FUSE: more operations, capabilities, interrupts, flags of requests.
 *
 * Technique. pyfuse3 hands libfuse a table of its operations through fuse_session_new, and reads requests through
 * fuse_session_receive_buf. This object defines functions of those names. It is loaded with RTLD_GLOBAL before pyfuse3
 * is imported, so the dynamic linker binds pyfuse3's calls to them. They call libfuse's own, with a table that is a copy
 * of pyfuse3's in which
 *   - operations that pyfuse3 has go through `begin` first, which notes what pyfuse3 does not pass on and asks libfuse to
 *     tell of interrupts, and then to pyfuse3, unchanged;
 *   - operations that it does not have are handed to Python (`fuse_extension.on_request`), which answers later;
 *   - extended attributes that no file has are refused at once: the kernel asks for one before every write;
 *   - `init` chooses capabilities when pyfuse3 has chosen its own.
 * A read that finds no request, because its process was killed after poll, is reported as EINTR, which pyfuse3 retries.
 *
 * fuse_extension.py is the other side: it fills in `fuse_extension`, and nothing else knows of all this.
 *
 * Assumptions, and what happens if one does not hold:
 *   - The linker finds our functions first, by name whatever their version (glibc). Else they are never called,
 *     `session` stays NULL, and Python reports that all features are off.
 *   - pyfuse3 and this object use the same libfuse, of the version of the headers: the library's soname sees to the
 *     latter; Python compares addresses for the former. If not, `enabled` stays 0 and calls go straight through.
 *   - One thread, with the GIL, calls libfuse's request processing; one session for each process. A second one passes
 *     straight through.
 *   - pyfuse3 begins to run its handler in the very step in which it processes the request, so that Python can ask what
 *     `begin` noted. Else `number` is 0, or the handler's own check fails, and the request has no flags or interrupts.
 *
 * Ownership of requests. A request of pyfuse3's is pyfuse3's. One of ours belongs to Python from `taken` on, to be answered
 * exactly once with fuse_reply_*; if it is not taken it is answered here. Interrupts know requests by number, never by
 * address: one that comes late finds nothing.
 */

#define FUSE_USE_VERSION 35
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>

#undef fuse_session_new /* a macro, in newer versions */
#define EXPORT __attribute__((visibility("default")))

EXPORT const char fuse_extension_fingerprint[] = FINGERPRINT; /* of this file, when it was compiled */

enum operation { GETLK, SETLK, FLOCK, FALLOCATE, LSEEK, COPY_FILE_RANGE };

enum request_flag { FROM_PAGE_CACHE = 1, HAS_LOCK_OWNER = 2, RELEASES_FLOCK = 4 };

/* An operation for Python. Which fields mean something depends on it; see fuse_extension.py. */
struct request {
    fuse_req_t req;
    uint64_t number;
    int32_t operation, taken;
    uint64_t ino, fh, lock_owner;
    int64_t start, end; /* inclusive; of a lock, or offset and length */
    int32_t kind, pid, wait, flags;
    uint64_t ino_out, fh_out;
    int64_t offset_out;
};

typedef struct fuse_session *(*new_function)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *(*new_versioned_function)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                                       void *version, void *);
typedef int (*receive_function)(struct fuse_session *, struct fuse_buf *);

EXPORT struct {
    /* Set by Python before fuse_session_new. */
    new_function libfuse_new;
    new_versioned_function libfuse_new_versioned;
    receive_function libfuse_receive;
    void (*on_request)(struct request *);
    void (*on_interrupt)(uint64_t number, int32_t pid);
    uint32_t enabled;
    uint32_t handled; /* bits: operations that go to Python */
    uint32_t want; /* FUSE_CAP_* beside pyfuse3's */
    uint32_t max_background; /* requests that the kernel sends without waiting for answers; 0: as many as it thinks fit */
    const char *absent_xattrs; /* beginnings of their names, each ended by a NUL, the last by two */
    /* Set here. */
    uint32_t capable, wanted; /* after init */
    struct fuse_session *session;
    /* Of the request that is being processed. */
    uint64_t number; /* Python sets it back to 0 when it has asked */
    uint64_t lock_owner;
    uint32_t flags;
} fuse_extension;

#define self fuse_extension

static struct fuse_lowlevel_ops theirs;
static uint64_t last_number;

/* Requests in general */

static void interrupted(fuse_req_t req, void *number)
{
    if (self.on_interrupt)
        self.on_interrupt((uintptr_t)number, fuse_req_ctx(req)->pid);
}

static void begin(fuse_req_t req, uint32_t flags, uint64_t lock_owner)
{
    self.number = ++last_number;
    self.flags = flags;
    self.lock_owner = lock_owner;
    fuse_req_interrupt_func(req, interrupted, (void *)(uintptr_t)self.number);
}

/* pyfuse3's operations */

#define THROUGH(name, parameters, arguments) \
    static void through_##name parameters    \
    {                                        \
        begin(req, 0, 0);                    \
        theirs.name arguments;               \
    }

THROUGH(lookup, (fuse_req_t req, fuse_ino_t parent, const char *name), (req, parent, name))
THROUGH(getattr, (fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi), (req, ino, fi))
THROUGH(setattr, (fuse_req_t req, fuse_ino_t ino, struct stat *attr, int to_set, struct fuse_file_info *fi),
        (req, ino, attr, to_set, fi))
THROUGH(readlink, (fuse_req_t req, fuse_ino_t ino), (req, ino))
THROUGH(mknod, (fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, dev_t rdev),
        (req, parent, name, mode, rdev))
THROUGH(mkdir, (fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode), (req, parent, name, mode))
THROUGH(unlink, (fuse_req_t req, fuse_ino_t parent, const char *name), (req, parent, name))
THROUGH(rmdir, (fuse_req_t req, fuse_ino_t parent, const char *name), (req, parent, name))
THROUGH(symlink, (fuse_req_t req, const char *target, fuse_ino_t parent, const char *name), (req, target, parent, name))
THROUGH(rename, (fuse_req_t req, fuse_ino_t parent, const char *name, fuse_ino_t new_parent, const char *new_name,
                 unsigned int flags), (req, parent, name, new_parent, new_name, flags))
THROUGH(link, (fuse_req_t req, fuse_ino_t ino, fuse_ino_t parent, const char *name), (req, ino, parent, name))
THROUGH(open, (fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi), (req, ino, fi))
THROUGH(create, (fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi),
        (req, parent, name, mode, fi))
THROUGH(read, (fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi),
        (req, ino, size, off, fi))
THROUGH(fsync, (fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi), (req, ino, datasync, fi))
THROUGH(opendir, (fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi), (req, ino, fi))
THROUGH(readdirplus, (fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi),
        (req, ino, size, off, fi))
THROUGH(releasedir, (fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi), (req, ino, fi))
THROUGH(fsyncdir, (fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi), (req, ino, datasync, fi))
THROUGH(statfs, (fuse_req_t req, fuse_ino_t ino), (req, ino))
THROUGH(setxattr, (fuse_req_t req, fuse_ino_t ino, const char *name, const char *value, size_t size, int flags),
        (req, ino, name, value, size, flags))
THROUGH(listxattr, (fuse_req_t req, fuse_ino_t ino, size_t size), (req, ino, size))
THROUGH(removexattr, (fuse_req_t req, fuse_ino_t ino, const char *name), (req, ino, name))

static int is_absent(const char *name)
{
    for (const char *start = self.absent_xattrs; start && *start; start += strlen(start) + 1)
        if (!strncmp(name, start, strlen(start)))
            return 1;
    return 0;
}

static void through_getxattr(fuse_req_t req, fuse_ino_t ino, const char *name, size_t size)
{
    if (is_absent(name)) {
        fuse_reply_err(req, ENODATA);
        return;
    }
    begin(req, 0, 0);
    theirs.getxattr(req, ino, name, size);
}

static void through_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *data, off_t off,
                              struct fuse_file_info *fi)
{
    begin(req, fi->writepage ? FROM_PAGE_CACHE : 0, 0);
    theirs.write_buf(req, ino, data, off, fi);
}

static void through_flush(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    begin(req, HAS_LOCK_OWNER, fi->lock_owner);
    theirs.flush(req, ino, fi);
}

static void through_release(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
    begin(req, fi->flock_release ? HAS_LOCK_OWNER | RELEASES_FLOCK : 0, fi->lock_owner);
    theirs.release(req, ino, fi);
}

/* Operations for Python */

static struct request made_of(enum operation operation, fuse_req_t req, fuse_ino_t ino,
                              const struct fuse_file_info *fi)
{
    begin(req, 0, 0);
    return (struct request){.req = req, .number = self.number, .operation = operation, .ino = ino,
                            .fh = fi ? fi->fh : 0, .lock_owner = fi ? fi->lock_owner : 0};
}

static void hand_over(struct request *request)
{
    fuse_req_t req = request->req;
    if (self.on_request)
        self.on_request(request);
    if (!request->taken)
        fuse_reply_err(req, EIO);
}

static void lock_request(struct request request, const struct flock *lock, int wait)
{
    request.kind = lock->l_type;
    request.start = lock->l_start;
    request.end = lock->l_len ? lock->l_start + lock->l_len - 1 : INT64_MAX;
    request.pid = lock->l_pid;
    request.wait = wait;
    hand_over(&request);
}

static void own_getlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock)
{
    lock_request(made_of(GETLK, req, ino, fi), lock, 0);
}

static void own_setlk(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, struct flock *lock, int wait)
{
    lock_request(made_of(SETLK, req, ino, fi), lock, wait);
}

static void own_flock(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi, int how)
{
    struct request request = made_of(FLOCK, req, ino, fi);
    request.kind = how & LOCK_SH ? F_RDLCK : how & LOCK_EX ? F_WRLCK : F_UNLCK;
    request.wait = !(how & LOCK_NB);
    hand_over(&request);
}

static void own_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
                          struct fuse_file_info *fi)
{
    struct request request = made_of(FALLOCATE, req, ino, fi);
    request.start = offset;
    request.end = length;
    request.flags = mode;
    hand_over(&request);
}

static void own_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
    struct request request = made_of(LSEEK, req, ino, fi);
    request.start = off;
    request.flags = whence;
    hand_over(&request);
}

static void own_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in, struct fuse_file_info *fi_in,
                                fuse_ino_t ino_out, off_t off_out, struct fuse_file_info *fi_out, size_t length,
                                int flags)
{
    struct request request = made_of(COPY_FILE_RANGE, req, ino_in, fi_in);
    request.start = off_in;
    request.end = length > INT64_MAX ? INT64_MAX : (int64_t)length;
    request.ino_out = ino_out;
    request.fh_out = fi_out ? fi_out->fh : 0;
    request.offset_out = off_out;
    request.flags = flags;
    hand_over(&request);
}

EXPORT int fuse_extension_reply_lock(fuse_req_t req, int kind, int64_t start, int64_t end, int pid)
{
    struct flock lock = {.l_type = kind, .l_whence = SEEK_SET, .l_start = start,
                         .l_len = end == INT64_MAX ? 0 : end - start + 1, .l_pid = pid};
    return fuse_reply_lock(req, &lock);
}

/* The session */

static void through_init(void *userdata, struct fuse_conn_info *conn)
{
    theirs.init(userdata, conn);
    conn->want |= self.want & conn->capable;
    if (self.max_background)
        conn->max_background = conn->congestion_threshold = self.max_background;
    self.capable = conn->capable;
    self.wanted = conn->want;
}

static struct fuse_lowlevel_ops extended(const struct fuse_lowlevel_ops *op, size_t size)
{
    struct fuse_lowlevel_ops table;
    memset(&theirs, 0, sizeof theirs);
    memcpy(&theirs, op, size < sizeof theirs ? size : sizeof theirs);
    table = theirs;
#define USE_THROUGH(name) if (theirs.name) table.name = through_##name
    USE_THROUGH(init); USE_THROUGH(lookup); USE_THROUGH(getattr); USE_THROUGH(setattr); USE_THROUGH(readlink);
    USE_THROUGH(mknod); USE_THROUGH(mkdir); USE_THROUGH(unlink); USE_THROUGH(rmdir); USE_THROUGH(symlink);
    USE_THROUGH(rename); USE_THROUGH(link); USE_THROUGH(open); USE_THROUGH(create); USE_THROUGH(read);
    USE_THROUGH(write_buf); USE_THROUGH(flush); USE_THROUGH(release); USE_THROUGH(fsync); USE_THROUGH(opendir);
    USE_THROUGH(readdirplus); USE_THROUGH(releasedir); USE_THROUGH(fsyncdir); USE_THROUGH(statfs);
    USE_THROUGH(setxattr); USE_THROUGH(getxattr); USE_THROUGH(listxattr); USE_THROUGH(removexattr);
#define USE_OWN(OPERATION, name) if (self.handled & (1u << (OPERATION)) && !theirs.name) table.name = own_##name
    USE_OWN(GETLK, getlk); USE_OWN(SETLK, setlk); USE_OWN(FLOCK, flock); USE_OWN(FALLOCATE, fallocate);
    USE_OWN(LSEEK, lseek); USE_OWN(COPY_FILE_RANGE, copy_file_range);
    return table;
}

EXPORT struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t size,
                                             void *userdata)
{
    if (!self.libfuse_new)
        return NULL;
    if (!self.enabled || self.session)
        return self.libfuse_new(args, op, size, userdata);
    struct fuse_lowlevel_ops table = extended(op, size); /* libfuse copies it */
    return self.session = self.libfuse_new(args, &table, sizeof table, userdata);
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)
EXPORT struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *op,
                                                       size_t size, struct libfuse_version *version, void *userdata)
{
    if (!self.libfuse_new_versioned)
        return NULL;
    if (!self.enabled || self.session)
        return self.libfuse_new_versioned(args, op, size, version, userdata);
    struct fuse_lowlevel_ops table = extended(op, size);
    return self.session = self.libfuse_new_versioned(args, &table, sizeof table, version, userdata);
}
#endif

EXPORT int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
    if (!self.libfuse_receive)
        return -EIO;
    int result = self.libfuse_receive(session, buffer);
    return result == -EAGAIN && session == self.session ? -EINTR : result;
}
