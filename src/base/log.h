/* Lines for people, on stderr. The level is the one global of the program. */
#ifndef MT_BASE_LOG_H
#define MT_BASE_LOG_H

enum mt_log_level { MT_LOG_ERROR, MT_LOG_WARN, MT_LOG_INFO, MT_LOG_DEBUG };

void mt_log_set_level(enum mt_log_level level); /* default MT_LOG_INFO */
enum mt_log_level mt_log_get_level(void);

/* Writes one line, "warning: " or "error: " in front where it is one. Thread-safe. */
void mt_log(enum mt_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define mt_info(...) mt_log(MT_LOG_INFO, __VA_ARGS__)
#define mt_warn(...) mt_log(MT_LOG_WARN, __VA_ARGS__)

#endif
