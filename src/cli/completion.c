/* `moetune completion`: what bash and zsh complete command lines with, from the option table. */
#include <string.h>

#include "cli/commands.h"

struct completion_options {
  int shell; /* of the choices below */
};

#define S struct completion_options

static const struct mt_option rows[] = {
    {.group = "Options",
     .flag = "shell",
     .type = MT_OPT_CHOICE,
     .offset = offsetof(S, shell),
     .unit = "SHELL",
     .choices = "bash|zsh",
     .required = true,
     .help = "The shell that is to complete; the flag's name may be left out."},
};

static mt_err run(const void *options) {
  const S *o = options;
  (o->shell ? mt_completion_zsh : mt_completion_bash)(stdout);
  return MT_OK;
}

const struct mt_command mt_command_completion = {
    .name = "completion",
    .summary = "prints what a shell completes command lines with",
    .usage = "bash|zsh",
    .description = "Prints a script that teaches a shell the commands, their options and the "
                   "options' values. `make install` installs both where shells look for them.",
    .examples = "  eval \"$(moetune completion bash)\"\n"
                "  moetune completion zsh > ~/.zfunc/_moetune    # a directory in $fpath\n",
    .options = rows,
    .option_count = MT_ROW_COUNT(rows),
    .positional = "shell",
    .options_bytes = sizeof(S),
    .run = run,
};

/* What a row's value is completed with. */
enum kind { KIND_NONE, KIND_CHOICES, KIND_FILE, KIND_DIRECTORY };

static enum kind kind_of(const struct mt_option *row) {
  if (row->choices) return KIND_CHOICES;
  if (!row->unit) return KIND_NONE;
  if (strcmp(row->unit, "DIR") == 0) return KIND_DIRECTORY;
  static const char *const files[] = {"FILE", "PATH", "CONFIG"};
  for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
    if (strcmp(row->unit, files[i]) == 0) return KIND_FILE;
  }
  return KIND_NONE;
}

/* "a|b|c" with blanks. */
static void print_choices(FILE *out, const char *choices) {
  for (; *choices; choices++) fputc(*choices == '|' ? ' ' : *choices, out);
}

static const struct mt_option *positional_row(const struct mt_command *c) {
  return c->positional ? mt_option_row(c, mt_option_index(c, c->positional, strlen(c->positional)))
                       : NULL;
}

/* Sets what completes a value: choices or kind. */
static void bash_value(FILE *out, const struct mt_option *row) {
  static const char *const kinds[] = {"none", "", "file", "directory"};
  if (row->choices) {
    fputs("choices='", out);
    print_choices(out, row->choices);
    fputs("'", out);
  } else {
    fprintf(out, "kind=%s", kinds[kind_of(row)]);
  }
}

static void bash_command(FILE *out, const struct mt_command *c) {
  const struct mt_option *row, *alone = positional_row(c);
  fprintf(out, "  %s)\n    flags='", c->name);
  for (int i = 0; (row = mt_option_row(c, i)); i++) {
    fprintf(out, "%s--%s%s", i ? " " : "", mt_option_negated(row) ? "no-" : "", row->flag);
  }
  fputs("'\n    case $prev in\n", out);
  for (int i = 0; (row = mt_option_row(c, i)); i++) {
    if (row->type == MT_OPT_FLAG) continue;
    fprintf(out, "    --%s) ", row->flag);
    bash_value(out, row);
    fputs(" ;;\n", out);
  }
  fputs("    *) ", out);
  if (alone)
    bash_value(out, alone);
  else
    fputs("kind=none", out);
  fputs(" ;;\n    esac ;;\n", out);
}

void mt_completion_bash(FILE *out) {
  fputs("# bash completion of moetune " MOETUNE_VERSION ", made by `moetune completion bash`\n"
        "_moetune() {\n"
        "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}\n"
        "  local command=${COMP_WORDS[1]} flags= choices= kind=none\n"
        "  COMPREPLY=()\n"
        "  if [[ $cur == '=' ]]; then # bash makes three words of --flag=value\n"
        "    cur=\n"
        "  elif [[ $prev == '=' ]]; then\n"
        "    prev=${COMP_WORDS[COMP_CWORD-2]}\n"
        "  fi\n"
        "  if (( COMP_CWORD == 1 )); then command=; fi\n"
        "  case $command in\n  '') choices='",
        out);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) fprintf(out, "%s ", (*c)->name);
  fputs("help' flags='--help --version' ;;\n  help) choices='", out);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    fprintf(out, "%s%s", (*c)->name, c[1] ? " " : "' ;;\n");
  }
  for (const struct mt_command *const *c = mt_commands(); *c; c++) bash_command(out, *c);
  fputs("  esac\n"
        "  if [[ $cur == -* ]]; then\n"
        "    choices=$flags\n"
        "  elif [[ -z $choices && $kind != none ]]; then\n"
        "    compopt -o filenames 2>/dev/null\n"
        "    if [[ $kind == directory ]]; then\n"
        "      mapfile -t COMPREPLY < <(compgen -d -- \"$cur\")\n"
        "    else\n"
        "      mapfile -t COMPREPLY < <(compgen -f -- \"$cur\")\n"
        "    fi\n"
        "    return\n"
        "  fi\n"
        "  mapfile -t COMPREPLY < <(compgen -W \"$choices\" -- \"$cur\")\n"
        "}\n"
        "complete -F _moetune moetune\n",
        out);
}

/* The first sentence of a help text inside '...[...]': what zsh takes for its own is escaped. */
static void zsh_text(FILE *out, const char *text) {
  const char *end = strstr(text, ". ");
  size_t length = end ? (size_t)(end - text) : strlen(text);
  if (length && text[length - 1] == '.') length--;
  for (size_t i = 0; i < length; i++) {
    if (text[i] == '\'')
      fputs("'\\''", out);
    else if (strchr("[]:\\", text[i]))
      fprintf(out, "\\%c", text[i]);
    else
      fputc(text[i], out);
  }
}

static void zsh_action(FILE *out, const struct mt_option *row) {
  enum kind kind = kind_of(row);
  if (kind == KIND_CHOICES) {
    fputc('(', out);
    print_choices(out, row->choices);
    fputc(')', out);
  } else {
    fputs(kind == KIND_FILE ? "_files" : kind == KIND_DIRECTORY ? "_directories" : " ", out);
  }
}

static void zsh_option(FILE *out, const struct mt_option *row) {
  bool flag = row->type == MT_OPT_FLAG;
  fprintf(out, "        '%s--%s%s%s[", row->type == MT_OPT_LIST ? "*" : "",
          mt_option_negated(row) ? "no-" : "", row->flag, flag ? "" : "=");
  zsh_text(out, row->help);
  fputc(']', out);
  if (!flag) {
    fprintf(out, "%s%s:", row->type == MT_OPT_OPTIONAL ? "::" : ":", row->unit);
    zsh_action(out, row);
  }
  fputs("' \\\n", out);
}

static void zsh_command(FILE *out, const struct mt_command *c) {
  const struct mt_option *row, *alone = positional_row(c);
  fprintf(out, "      %s)\n        _arguments -s \\\n", c->name);
  for (int i = 0; (row = mt_option_row(c, i)); i++) zsh_option(out, row);
  if (alone) {
    fprintf(out, "        '1:%s:", alone->unit);
    zsh_action(out, alone);
    fputs("' \\\n", out);
  }
  fputs("        && ret=0 ;;\n", out);
}

void mt_completion_zsh(FILE *out) {
  fputs("#compdef moetune\n"
        "# zsh completion of moetune " MOETUNE_VERSION ", made by `moetune completion zsh`\n"
        "_moetune() {\n"
        "  local curcontext=$curcontext state line ret=1\n"
        "  local -a commands=(\n",
        out);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) {
    fprintf(out, "    '%s:", (*c)->name);
    zsh_text(out, (*c)->summary);
    fputs("'\n", out);
  }
  fputs("    'help:shows the page of a command'\n"
        "  )\n"
        "  _arguments -C '(- *)--version[shows the version]' '(- *)--help[shows the commands]' \\\n"
        "    '1:command:->command' '*::argument:->argument' && ret=0\n"
        "  case $state in\n"
        "  command) _describe -t commands command commands && ret=0 ;;\n"
        "  argument)\n"
        "    case $words[1] in\n"
        "      help) _describe -t commands command commands && ret=0 ;;\n",
        out);
  for (const struct mt_command *const *c = mt_commands(); *c; c++) zsh_command(out, *c);
  fputs("    esac ;;\n"
        "  esac\n"
        "  return ret\n"
        "}\n"
        "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then\n"
        "  _moetune \"$@\"\n"
        "else\n"
        "  compdef _moetune moetune\n"
        "fi\n",
        out);
}
