/* Memory of the JSON library, which does not survive being refused any: its parser then reads past
 * what it has, its writer leaves names out. */
#ifndef MT_CLI_JSON_MEMORY_H
#define MT_CLI_JSON_MEMORY_H

/* From now on it is given from a reserve where the system has none left; once that is used up too,
 * the program ends with a message and status 1. Called once, before the first JSON. */
void mt_json_memory_reserve(void);

#endif
