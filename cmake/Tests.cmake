# tests/LABEL/test_*.c: one executable and one CTest test each, labelled by its folder.
file(GLOB test_sources CONFIGURE_DEPENDS tests/*/test_*.c)
list(FILTER test_sources EXCLUDE REGEX "/tests/dist/")
if(NOT MPI_C_FOUND)
  list(FILTER test_sources EXCLUDE REGEX "/tests/ranks/") # these call mpirun
endif()
foreach(source ${test_sources})
  get_filename_component(name ${source} NAME_WE)
  get_filename_component(dir ${source} DIRECTORY)
  get_filename_component(label ${dir} NAME)
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE moetune PkgConfig::CMOCKA)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE MT_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  add_test(NAME ${label}/${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(${label}/${name} PROPERTIES LABELS ${label} TIMEOUT 1200
    ENVIRONMENT "XDG_CACHE_HOME=${CMAKE_BINARY_DIR}/test-cache" # not the developer's own
    SKIP_RETURN_CODE 77) # what tests/gpu give where no GPU is
  if(name MATCHES "^test_(cuda_mx|cublas_mx|cuda_paths)" AND TARGET moetune_nccl) # they look behind a backend
    target_link_libraries(${name} PRIVATE moetune_nccl)
  endif()
  if(label MATCHES "^(cli|api|faults|ranks)$") # these start the program
    add_dependencies(${name} moetune_cli)
    target_compile_definitions(${name} PRIVATE MT_CLI_PATH="$<TARGET_FILE:moetune_cli>")
  endif()
  if(label STREQUAL "ranks")
    add_dependencies(${name} kill)
    target_compile_definitions(${name} PRIVATE MT_KILL_PATH="$<TARGET_FILE:kill>"
      MT_MPIEXEC="${MPIEXEC_EXECUTABLE}")
  endif()
  if(label STREQUAL "faults")
    add_dependencies(${name} faults)
    target_compile_definitions(${name} PRIVATE MT_FAULTS_PATH="$<TARGET_FILE:faults>")
  endif()
endforeach()

# tests/dist/test_*.c: the same under mpirun, once for each number of ranks. Ranks are more than cores
# here: nothing is bound, and one thread each is enough.
set(rank_counts 1 2 3 4 6 8)
if(MOETUNE_SANITIZE) # what they look for shows on few ranks as well
  set(rank_counts 1 2 3 4)
endif()
file(GLOB dist_sources CONFIGURE_DEPENDS tests/dist/test_*.c)
foreach(source ${dist_sources})
  get_filename_component(name ${source} NAME_WE)
  if(name STREQUAL "test_shared" AND TARGET moetune_nccl)
    continue() # its stand-in for CUDA does not go beside the real one
  endif()
  add_executable(${name} ${source})
  target_link_libraries(${name} PRIVATE moetune PkgConfig::CMOCKA)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests)
  target_compile_definitions(${name} PRIVATE MT_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  if(name STREQUAL "test_shared") # the GPUs' communicators, compiled once more for the host
    target_sources(${name} PRIVATE src/par/nccl.c src/par/nccl_limits.c src/par/nccl_load.c
                                          src/par/nccl_shared.c)
    target_include_directories(${name} BEFORE PRIVATE ${CMAKE_SOURCE_DIR}/tests/fake_cuda)
    target_compile_definitions(${name} PRIVATE MOETUNE_WITH_CUDA)
  elseif(TARGET moetune_nccl)
    target_link_libraries(${name} PRIVATE moetune_nccl)
  endif()
  # Alone MPI is never started, so leaks are our own; under mpirun plug-ins that are unloaded again
  # leave some that have no name.
  add_test(NAME dist/${name}_alone COMMAND ${name} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(dist/${name}_alone PROPERTIES LABELS dist TIMEOUT 600
    SKIP_RETURN_CODE 77) # without a GPU
  if(MPI_C_FOUND)
    target_link_libraries(${name} PRIVATE MPI::MPI_C)
    foreach(ranks ${rank_counts})
      add_test(NAME dist/${name}_${ranks} WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
        COMMAND ${MPIEXEC_EXECUTABLE} --allow-run-as-root --oversubscribe --bind-to none
          -n ${ranks} $<TARGET_FILE:${name}>)
      set(environment "NCCL_NVLS_ENABLE=0;OMP_NUM_THREADS=1;OMP_WAIT_POLICY=passive;OMPI_MCA_btl_vader_single_copy_mechanism=none;LSAN_OPTIONS=detect_leaks=0")
      # Messages of more than 128 bytes that leave only when they are received: who writes too early
      # into what is under way is seen, though models are small. (Open MPI 4's name for it, and 5's.)
      set(late "OMPI_MCA_btl_vader_eager_limit=128;OMPI_MCA_btl_sm_eager_limit=128")
      set_tests_properties(dist/${name}_${ranks} PROPERTIES LABELS dist TIMEOUT 1200
        SKIP_RETURN_CODE 77 ENVIRONMENT "${environment};${late}")
      if(name MATCHES "^test_(overlap|pipeline)$") # these look at the clock, where ranks are few and no sanitizer is
        set_tests_properties(dist/${name}_${ranks} PROPERTIES ENVIRONMENT "${environment}")
        if(ranks GREATER 1 AND ranks LESS 5 AND NOT MOETUNE_SANITIZE)
          set_tests_properties(dist/${name}_${ranks} PROPERTIES RUN_SERIAL TRUE)
        endif()
      endif()
      if(name STREQUAL "test_pipeline" AND ranks GREATER 1 AND ranks LESS 4)
        add_test(NAME dist/${name}_${ranks}_late WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
          COMMAND ${MPIEXEC_EXECUTABLE} --allow-run-as-root --oversubscribe --bind-to none
            -n ${ranks} $<TARGET_FILE:${name}>)
        set_tests_properties(dist/${name}_${ranks}_late PROPERTIES LABELS dist TIMEOUT 1200
          ENVIRONMENT "${environment};${late};MOETUNE_TEST=float32_equals_one_rank")
      endif()
    endforeach()
  endif()
endforeach()

# tests/LABEL/test_*.sh: the same for shell scripts.
file(GLOB test_scripts CONFIGURE_DEPENDS tests/*/test_*.sh)
foreach(source ${test_scripts})
  get_filename_component(name ${source} NAME_WE)
  get_filename_component(dir ${source} DIRECTORY)
  get_filename_component(label ${dir} NAME)
  add_test(NAME ${label}/${name} COMMAND sh ${source} WORKING_DIRECTORY ${CMAKE_BINARY_DIR})
  set_tests_properties(${label}/${name} PROPERTIES LABELS ${label} TIMEOUT 600
    SKIP_RETURN_CODE 77)
endforeach()

# A runner that cannot fail proves nothing: this program fails, and the test is that it is noticed.
set_tests_properties(unit/test_runner_fails PROPERTIES WILL_FAIL TRUE)

# Threads of several tuners and programs: those that wait must not spin on another's core.
set_property(TEST api/test_tuner api/test_install APPEND PROPERTY ENVIRONMENT
  "OMP_WAIT_POLICY=passive")
# tests/api/*.sh compile programs of their own against what is installed.
set(sanitizer_flags $<$<BOOL:${MOETUNE_SANITIZE}>:-fsanitize=address,undefined>)
set_property(TEST api/test_install APPEND PROPERTY ENVIRONMENT
  "CC=${CMAKE_C_COMPILER}" "CMAKE=${CMAKE_COMMAND}" "FLAGS=${sanitizer_flags}"
  "CUDA_LIB_DIR=${cuda_lib_dir}"
  "XDG_CACHE_HOME=${CMAKE_BINARY_DIR}/test-cache")

# What tests/faults preloads; it never sees the sanitizers' flags, their run-time comes after it.
add_library(faults MODULE tests/faults/faults.c)
set_target_properties(faults PROPERTIES PREFIX "")
target_compile_definitions(faults PRIVATE _GNU_SOURCE)
target_compile_options(faults PRIVATE -Wall -Wextra -fno-omit-frame-pointer
  $<$<BOOL:${MOETUNE_WERROR}>:-Werror>)
target_link_libraries(faults PRIVATE ${CMAKE_DL_LIBS})

# What tests/ranks preloads into ranks.
if(MPI_C_FOUND)
  add_library(kill MODULE tests/ranks/kill.c)
  set_target_properties(kill PROPERTIES PREFIX "")
  target_compile_definitions(kill PRIVATE _GNU_SOURCE)
  target_compile_options(kill PRIVATE -Wall -Wextra $<$<BOOL:${MOETUNE_WERROR}>:-Werror>)
  target_link_libraries(kill PRIVATE MPI::MPI_C ${CMAKE_DL_LIBS})
endif()
