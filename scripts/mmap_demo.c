/* Two ends of one shared page: shows whether a store through one mapping reaches another.
 *
 *   mmap_demo [options] FILE        reader: map one page shared; each interval print byte 0 as two hex digits
 *   mmap_demo [options] FILE mod    writer: each interval increment byte 0, msync(MS_ASYNC), fsync, print it
 *
 * Options, for measuring; without them both act once a second:
 *   -i MS   interval in milliseconds, fractions allowed; 0: no pause at all
 *   -n N    end after N lines
 *   -c      reader: print only when the byte has changed (the first line always comes)
 *   -t      add times of CLOCK_MONOTONIC in nanoseconds, one clock for the whole machine:
 *             writer "hh STORED DONE": STORED is just before the byte changed, DONE when fsync had returned.
 *             reader "hh SEEN OLD": SEEN is when the load of this byte had returned; OLD is when the last load
 *             of a different byte had begun (0: there was none). OLD > DONE for the same byte is a stale read:
 *             a load that began after fsync returned and still got the old byte.
 *
 * An empty or missing FILE is made one page long by the writer; the reader refuses it.
 * Exit status: 0 done (-n), 1 a system call failed, 2 usage, 3 SIGBUS: the page could not be read.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void)
{
	struct timespec t;

	if (clock_gettime(CLOCK_MONOTONIC, &t))
		err(1, "clock_gettime");
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void on_sigbus(int signal_number)
{
	static const char text[] = "mmap_demo: SIGBUS: the page could not be read\n";

	(void)signal_number;
	if (write(STDERR_FILENO, text, sizeof text - 1) < 0)
		_exit(3);
	_exit(3);
}

static void pause_ns(long long interval_ns)
{
	struct timespec t = { interval_ns / 1000000000LL, interval_ns % 1000000000LL };

	if (interval_ns > 0)
		nanosleep(&t, NULL);
}

static void flush_line(void)
{
	if (fflush(stdout))
		err(1, "standard output");
}

static void write_loop(int fd, volatile unsigned char *page, size_t size, long long interval_ns, long lines, int times)
{
	for (long done = 0; !lines || done < lines; done++) {
		long long stored_ns = now_ns();
		unsigned char byte = ++page[0];

		if (msync((void *)page, size, MS_ASYNC))
			err(1, "msync");
		if (fsync(fd))
			err(1, "fsync");
		long long done_ns = now_ns();

		if (times)
			printf("%02x %lld %lld\n", byte, stored_ns, done_ns);
		else
			printf("%02x\n", byte);
		flush_line();
		pause_ns(interval_ns);
	}
}

static void read_loop(const volatile unsigned char *page, long long interval_ns, long lines, int times, int changes_only)
{
	int before = -1;
	long long before_began_ns = 0, old_ns = 0;

	for (long done = 0; !lines || done < lines; pause_ns(interval_ns)) {
		long long began_ns = now_ns();
		unsigned char byte = page[0];
		long long seen_ns = now_ns();
		int changed = byte != before;

		if (changed)
			old_ns = before_began_ns;
		before = byte;
		before_began_ns = began_ns;
		if (changes_only && !changed)
			continue;
		if (times)
			printf("%02x %lld %lld\n", byte, seen_ns, old_ns);
		else
			printf("%02x\n", byte);
		flush_line();
		done++;
	}
}

static int usage(void)
{
	fputs("usage: mmap_demo [-i MS] [-n LINES] [-c] [-t] FILE [mod]\n", stderr);
	return 2;
}

int main(int argc, char **argv)
{
	double interval_ms = 1000;
	long lines = 0;
	int times = 0, changes_only = 0, option;
	char *end;

	while ((option = getopt(argc, argv, "i:n:ct")) != -1) {
		switch (option) {
		case 'i':
			interval_ms = strtod(optarg, &end);
			if (end == optarg || *end || !(interval_ms >= 0 && interval_ms <= 1e9))
				return usage();
			break;
		case 'n':
			lines = strtol(optarg, &end, 10);
			if (end == optarg || *end || lines <= 0)
				return usage();
			break;
		case 'c':
			changes_only = 1;
			break;
		case 't':
			times = 1;
			break;
		default:
			return usage();
		}
	}
	argc -= optind;
	argv += optind;
	int writer = argc == 2 && !strcmp(argv[1], "mod");
	if (!(argc == 1 || writer))
		return usage();

	size_t size = (size_t)sysconf(_SC_PAGESIZE);
	struct stat status;
	int fd = writer ? open(argv[0], O_RDWR | O_CREAT | O_CLOEXEC, 0666) : open(argv[0], O_RDONLY | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &status))
		err(1, "%s", argv[0]);
	if (status.st_size == 0) {
		if (!writer)
			errx(1, "%s: empty, there is no byte to read", argv[0]);
		if (ftruncate(fd, (off_t)size))
			err(1, "%s", argv[0]);
	}
	void *page = mmap(NULL, size, writer ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
	if (page == MAP_FAILED)
		err(1, "%s: mmap", argv[0]);
	signal(SIGBUS, on_sigbus);

	long long interval_ns = (long long)(interval_ms * 1e6);
	if (writer)
		write_loop(fd, page, size, interval_ns, lines, times);
	else
		read_loop(page, interval_ns, lines, times, changes_only);
	return 0;
}
