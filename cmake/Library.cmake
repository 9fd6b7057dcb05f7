# What `make install` gives to other programs: libmoetune.so and libmoetune.a, both with the symbols
# of include/moetune alone, the headers, moetune.pc; and examples/*.c, which use nothing else.
include(GNUInstallDirs)
set(public_dir ${CMAKE_BINARY_DIR}/lib) # moetune_all beside it is not for use
file(GLOB public_headers CONFIGURE_DEPENDS include/moetune/*.h)

file(WRITE ${CMAKE_BINARY_DIR}/exports.map "{ global: mt_*; local: *; };\n")
file(WRITE ${CMAKE_BINARY_DIR}/shared.c "typedef int nothing_of_its_own;\n")
add_library(moetune_shared SHARED ${CMAKE_BINARY_DIR}/shared.c)
set_target_properties(moetune_shared PROPERTIES OUTPUT_NAME moetune
  LIBRARY_OUTPUT_DIRECTORY ${public_dir} LINK_DEPENDS ${CMAKE_BINARY_DIR}/exports.map
  VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR})
target_link_libraries(moetune_shared PRIVATE $<LINK_LIBRARY:WHOLE_ARCHIVE,moetune>)
# The map hides what CUDA's static run-time would show.
target_link_options(moetune_shared PRIVATE -Wl,--version-script=${CMAKE_BINARY_DIR}/exports.map)
target_include_directories(moetune_shared INTERFACE ${CMAKE_SOURCE_DIR}/include)

# One object in which the names that are hidden, and whatever else the compiler made, have become
# local (-d: OpenMP's locks too, which GCC leaves for the linker to allocate).
set(static_library ${public_dir}/libmoetune.a)
find_program(GNU_LD NAMES ld.bfd ld REQUIRED) # whatever linker and tools the compiler brings along
find_program(GNU_OBJCOPY NAMES objcopy REQUIRED)
add_custom_command(OUTPUT ${static_library} DEPENDS moetune VERBATIM
  COMMAND ${CMAKE_COMMAND} -E make_directory ${public_dir}
  COMMAND ${GNU_LD} -r -d --force-group-allocation --whole-archive $<TARGET_FILE:moetune>
    -o ${public_dir}/moetune.o
  COMMAND ${GNU_OBJCOPY} --localize-hidden --wildcard --localize-symbol=!mt_*
    --localize-symbol=* ${public_dir}/moetune.o
  COMMAND ${CMAKE_COMMAND} -E rm -f ${static_library}
  COMMAND ${CMAKE_AR} rcs ${static_library} ${public_dir}/moetune.o
  COMMAND ${CMAKE_COMMAND} -E rm -f ${public_dir}/moetune.o)
add_custom_target(moetune_static ALL DEPENDS ${static_library})

# Where the libraries that pkg-config does not know lie, for programs linked with libmoetune.a.
set(private_libs ${DNNL_LIBRARY} ${OpenMP_C_FLAGS} -lpthread -lm)
if(MPI_C_FOUND)
  list(APPEND private_libs ${MPI_C_LIBRARIES})
endif()
# cuda_lib_dir is of this configuration, where the libraries may be cached from another.
if(cuda_lib_dir)
  list(APPEND private_libs ${CUBLASLT_LIBRARY} ${CUDART_LIBRARY} -ldl -lrt -lstdc++) # launches are C++
  if(NOT MOETUNE_RELOCATABLE)
    set_target_properties(moetune_shared PROPERTIES INSTALL_RPATH ${cuda_lib_dir})
  endif()
endif()
list(JOIN private_libs " " private_libs)
file(RELATIVE_PATH prefix_from_pc /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/moetune.pc.in ${CMAKE_BINARY_DIR}/moetune.pc @ONLY)

install(TARGETS moetune_shared LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${static_library} DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES ${public_headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/moetune)
install(FILES ${CMAKE_BINARY_DIR}/moetune.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

file(GLOB example_sources CONFIGURE_DEPENDS examples/*.c)
foreach(source ${example_sources})
  get_filename_component(name ${source} NAME_WE)
  add_executable(example_${name} ${source})
  set_target_properties(example_${name} PROPERTIES C_EXTENSIONS OFF
    RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/examples OUTPUT_NAME ${name})
  target_compile_options(example_${name} PRIVATE -Wall -Wextra -Wpedantic
    $<$<BOOL:${MOETUNE_WERROR}>:-Werror>)
  target_link_libraries(example_${name} PRIVATE moetune_shared m)
  if(MOETUNE_SANITIZE)
    target_link_options(example_${name} PRIVATE -fsanitize=address,undefined)
  endif()
endforeach()
